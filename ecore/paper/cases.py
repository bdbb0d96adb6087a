"""Cases: single dialogues with the emotions perceived in them, the answers of several systems and the human one
(Figure 1, Tables 5 and 10 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ecore.errors import InputError
from ecore.evaluation.predictions import Record, read_predictions
from ecore.files import atomic_path, write_json

PREDICTIONS = Path("evaluation-test", "predictions.jsonl")
"""File in a run with the predictions of `ecore evaluate RUN` on the test split."""
SHOWN_EMOTIONS = 3
"""Emotions that a printed case lists: as many as count as co-occurring under the soft strategy."""

# What in a text would be markup in Markdown, and its place in a table's cell.
_MARKUP = str.maketrans({c: f"\\{c}" for c in "\\`*_<>|[]~#"})


@dataclass(frozen=True)
class Answer:
    """One system's.

    Attributes:
        text: its answer.
        perceived: the emotion it perceived, where the predictions have it.
        attention: (emotion, share) of the highest of Softmax(h_emo), the highest first; empty where not recorded.
        relevant: the co-occurring emotions of the hard strategy; None where not recorded.
    """

    text: str
    perceived: str | None
    attention: tuple[tuple[str, float], ...]
    relevant: tuple[str, ...] | None


@dataclass(frozen=True)
class Case:
    """One sample.

    Attributes:
        conv_id, turn: which; ``turn`` counts from 0, the turn that is answered.
        emotion: the true emotion, where the predictions have it.
        context: the turns before, the speaker's first.
        reference: the human answer.
        answers: by the systems' names, in the order given.
    """

    conv_id: str
    turn: int
    emotion: str | None
    context: tuple[str, ...]
    reference: str
    answers: dict[str, Answer]


def cases(
    predictions: Mapping[str, Path],
    conv_ids: Sequence[str | tuple[str, int]] | None = None,
    number: int = 5,
    seed: int = 0,
) -> list[Case]:
    """The same samples from several predictions files.

    Args:
        predictions: by system name, a predictions file or the folder of a run that `ecore evaluate` scored on the test
            split.
        conv_ids: the conversations to show, in this order, each at its last answered turn or, as (conv_id, turn), at
            that one. None draws ``number``
            samples instead: all samples are shuffled by ``seed``, and from the front the first one of every true
            emotion and conversation not seen yet is taken; when every emotion had its turn, the next round starts.
            Nothing is chosen by its answers.
        number: how many to draw at most.
        seed: of the draw.

    Raises:
        InputError: no file; a file or line that cannot be used; files that share no sample, or tell different
            references for one; a conversation or turn that is not in them; or a number under 1.
    """
    if not predictions:
        raise InputError("cases: expected at least one predictions file")
    if number < 1:
        raise InputError(f"number: expected at least 1, got {number}")
    systems = {name: _samples(Path(path)) for name, path in predictions.items()}
    first = next(iter(systems.values()))
    shared = [key for key in first if all(key in samples for samples in systems.values())]
    if not shared:
        raise InputError(f"cases: {', '.join(systems)} share no sample (conv_id and turn)")
    emotions = {key: _emotion([samples[key] for samples in systems.values()]) for key in shared}
    chosen = _drawn(emotions, number, seed) if conv_ids is None else _named(shared, conv_ids)
    return [_case(key, {name: samples[key] for name, samples in systems.items()}) for key in chosen]


def _samples(path: Path) -> dict[tuple[str, int], Record]:
    """A file's records by conversation and turn."""
    if path.is_dir():
        if not (path / PREDICTIONS).is_file():
            raise InputError(f"{path / PREDICTIONS}: no such file; `ecore evaluate {path}` writes it")
        path = path / PREDICTIONS
    samples: dict[tuple[str, int], Record] = {}
    for number, record in enumerate(read_predictions(path), start=1):
        context = record.get("context")
        if (
            not isinstance(record.get("conv_id"), str)
            or not isinstance(record.get("turn"), int)
            or not isinstance(context, list)
            or not all(isinstance(turn, str) for turn in context)
        ):
            raise InputError(
                f"{path}: sample {number}: expected 'conv_id', 'turn' and 'context' (a list of turns)"
            )
        key = (record["conv_id"], record["turn"])
        if key in samples:
            raise InputError(
                f"{path}: sample {number}: turn {key[1]} of {key[0]} again; expected every sample once"
            )
        samples[key] = record
    return samples


def _emotion(records: Sequence[Record]) -> str | None:
    """Return the true emotion, from the first system that has it."""
    return next((record["emotion"] for record in records if "emotion" in record), None)


def _drawn(emotions: Mapping[tuple[str, int], str | None], number: int, seed: int) -> list[tuple[str, int]]:
    """The documented rule of :func:`cases`."""
    samples = list(emotions)
    left = [samples[i] for i in np.random.default_rng(seed).permutation(len(samples)).tolist()]
    chosen: list[tuple[str, int]] = []
    seen: set[str] = set()
    while left and len(chosen) < number:
        heard: set[str | None] = set()
        waiting = []
        for key in left:
            if key[0] in seen:
                continue
            if emotions[key] in heard or len(chosen) == number:
                waiting.append(key)
                continue
            chosen.append(key)
            heard.add(emotions[key])
            seen.add(key[0])
        left = waiting
    return chosen


def _named(
    shared: Sequence[tuple[str, int]], conv_ids: Sequence[str | tuple[str, int]]
) -> list[tuple[str, int]]:
    turns: dict[str, list[int]] = {}
    for conv_id, turn in shared:
        turns.setdefault(conv_id, []).append(turn)
    chosen = []
    for named in conv_ids:
        conv_id, turn = (named, None) if isinstance(named, str) else named  # type: ignore[assignment]
        if conv_id not in turns:
            raise InputError(f"cases: no conversation {conv_id!r} in all predictions")
        if turn is not None and turn not in turns[conv_id]:
            raise InputError(f"cases: no turn {turn} of {conv_id!r} in all predictions")
        chosen.append((conv_id, max(turns[conv_id]) if turn is None else turn))
    return chosen


def _case(key: tuple[str, int], records: Mapping[str, Record]) -> Case:
    first = next(iter(records.values()))
    for name, record in records.items():
        if (record["reference"], record["context"]) != (first["reference"], first["context"]):
            raise InputError(
                f"cases: {name} tells another context or reference for turn {key[1]} of {key[0]}"
            )
    answers = {
        name: _answer(record, f"cases: {name}: turn {key[1]} of {key[0]}") for name, record in records.items()
    }
    return Case(*key, _emotion(list(records.values())), tuple(first["context"]), first["reference"], answers)


def _answer(record: Record, where: str) -> Answer:
    relevant = record.get("relevant")
    try:
        attention = tuple((str(emotion), float(share)) for emotion, share in record.get("emotions", ()))
        names = None if relevant is None else tuple(map(str, relevant))
    except (TypeError, ValueError):
        raise InputError(
            f"{where}: expected 'emotions' as [name, share] pairs, 'relevant' as names"
        ) from None
    return Answer(record["prediction"], record.get("predicted_emotion"), attention, names)


def format_cases(cases: Sequence[Case]) -> str:
    """Markdown: a heading and a table a case. S1 and L1 are the speaker's and the listener's first turns."""
    return "\n".join(line for number, case in enumerate(cases, start=1) for line in _lines(number, case))


def _lines(number: int, case: Case) -> list[str]:
    rows = [(f"{'SL'[turn % 2]}{turn // 2 + 1}", _cell(text)) for turn, text in enumerate(case.context)]
    rows.append(("**Human**", _cell(case.reference)))
    for name, answer in case.answers.items():
        rows.append((f"**{_cell(name)}**", _cell(answer.text)))
        if perceived := _perceived(answer, case.emotion):
            rows.append(("", perceived))
    emotion = f": {_cell(case.emotion)}" if case.emotion is not None else ""
    return [
        f"### Case {number}{emotion}",
        f"Conversation `{case.conv_id}`, turn {case.turn} (counted from 0)",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {text} |" for name, text in rows),
        "",
    ]


def _perceived(answer: Answer, emotion: str | None) -> str:
    """Format the emotions that a system perceived; the true one in bold."""

    def name(one: str) -> str:
        return f"**{_cell(one)}**" if one == emotion else _cell(one)

    parts = [f"perceived {name(answer.perceived)}"] if answer.perceived is not None else []
    if answer.attention:
        shares = [f"{name(e)} {100 * share:.0f} %" for e, share in answer.attention[:SHOWN_EMOTIONS]]
        parts.append(f"attention: {', '.join(shares)}")
    if answer.relevant is not None:
        parts.append(f"relevant: {', '.join(map(name, answer.relevant))}")
    return "; ".join(parts)


def _cell(text: str) -> str:
    """Return ``text`` unchanged, in one line of a table."""
    return " ".join(text.split()).translate(_MARKUP)


def write_cases(folder: Path, cases: Sequence[Case]) -> None:
    """Write ``cases.md`` (:func:`format_cases`) and ``cases.json`` to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "cases.md") as temporary:
        temporary.write_text(format_cases(cases), encoding="utf-8")
    write_json(folder / "cases.json", [asdict(case) for case in cases])
