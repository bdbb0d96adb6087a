"""Human evaluation (Section 4 and Appendix I of the paper): write a study's sheets, score the finished ones.

A study is a folder with a subfolder of sheets for each rater, and ``key.json``, which raters never get: it says which
system gave which response, and has the checksum of every text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ecore.errors import InputError
from ecore.files import expect_new_folder, new_folder, numbered_lines, write_json
from ecore.paper.human.key import FORMAT, KEY, Record, read_key
from ecore.paper.human.page import write_page
from ecore.paper.human.scores import count_choices, count_ratings, fleiss_kappa, format_scores, spearman
from ecore.paper.human.sheets import KINDS, Item, Sheet, checksum, clean, read_sheet, write_sheet

__all__ = ["export", "fleiss_kappa", "format_scores", "score", "spearman"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Context:
    """One context, and each different answer to it with the systems that gave it."""

    line: int  # in the first system's file
    conv_id: Any
    turn: Any
    turns: list[str]
    answers: dict[str, list[str]]


def export(
    systems: Mapping[str, Path | str],
    out: Path | str,
    contexts: int = 100,
    raters: int = 3,
    kind: str = "both",
    seed: int = 0,
) -> Record:
    """Draw contexts, write each rater's sheets as CSV and as pages, and the key; return the key.

    The same arguments make the same study on any machine, and a smaller draw is part of a larger one. The order of
    contexts and of responses differs from rater to rater. Equal answers to a context are rated once, for all systems
    that gave them; a choice between two equal answers is not asked: it is a tie.

    Args:
        systems: predictions files by name (see :mod:`ecore.evaluation.predictions`), which answer the same contexts
            line by line. They are matched by ``conv_id`` and ``turn``, or else by ``context``; at least one
            file must have ``context``. A/B choice is between the first system and each other.
        out: folder of the study.
        contexts: how many to draw; the paper takes 100.
        raters: how many; the paper has three.
        kind: ``rating``, ``ab`` or ``both``.

    Raises:
        InputError: a file that cannot be used, contexts that differ (by file and line) or are too few, a number
            under 1, nothing to compare, or ``out`` holds something.
    """
    out = Path(out)
    for name, number in (("contexts", contexts), ("raters", raters)):
        if number < 1:
            raise InputError(f"{name}: expected at least 1, got {number}")
    if kind not in (*KINDS, "both"):
        raise InputError(f"kind: expected {', '.join(KINDS)} or both, got {kind!r}")
    kinds = KINDS if kind == "both" else (kind,)
    if len(systems) < (2 if "ab" in kinds else 1):
        raise InputError(
            f"kind: {kind} needs two systems to choose between, got {len(systems)}; or take rating"
        )
    if (out / KEY).exists():
        raise InputError(f"{out}: holds a study already; expected a new or empty folder")
    expect_new_folder(out)
    available = _read_contexts(systems)
    if contexts > len(available):
        raise InputError(f"contexts: expected at most the {len(available)} of the files, got {contexts}")
    drawn = _shuffled(available, seed, "contexts")[:contexts]
    first = next(iter(systems))
    if "ab" in kinds and all(len(context.answers) == 1 for context in drawn):
        raise InputError(
            f"kind: every system answers every context as {first} does, there is nothing to choose"
        )
    key: Record = {
        "format": FORMAT,
        "seed": seed,
        "systems": {name: str(path) for name, path in systems.items()},
        "contexts": {str(c.line): {"conv_id": c.conv_id, "turn": c.turn} for c in drawn},
        "sheets": {},
    }
    written: dict[str, list[Item]] = {}
    for rater in range(1, raters + 1):
        for asked in kinds:
            name = f"{asked}-{rater}"
            questions = _questions(asked, drawn, first, seed, rater)
            items = [
                Item(f"{name}-{n:03}", c.turns, texts) for n, (c, texts) in enumerate(questions, start=1)
            ]
            asked_for = {
                item.id: {
                    "context": context.line,
                    "systems": [context.answers[text] for text in texts],
                    "sha256": [checksum(cell) for cell in item.cells()],
                }
                for item, (context, texts) in zip(items, questions, strict=True)
            }
            key["sheets"][name] = {"kind": asked, "rater": rater, "items": asked_for}
            written[name] = items
    study = checksum(repr(key))[:16]
    with new_folder(out) as whole:
        for name, items in written.items():
            asked, rater = key["sheets"][name]["kind"], key["sheets"][name]["rater"]
            folder = whole / f"rater-{rater}"
            folder.mkdir(exist_ok=True)
            write_sheet(folder / f"{name}.csv", asked, items)
            write_page(folder / f"{name}.html", asked, study, name, rater, items)
        write_json(whole / KEY, key, sealed=True)
    return key


def _questions(
    kind: str, drawn: Sequence[_Context], first: str, seed: int, rater: int
) -> list[tuple[_Context, list[str]]]:
    """Return a rater's questions, in order: a context, and the response to rate or the two to choose from."""
    where = (seed, kind, rater)
    if kind == "rating":
        return [
            (context, [text])
            for context in _shuffled(drawn, *where)
            for text in _shuffled([*context.answers], *where, context.line)
        ]
    # Choices of one context are apart, not in a row: what they share would give away the first system.
    pairs = []
    for context in drawn:
        own = next(text for text, names in context.answers.items() if first in names)
        for text in context.answers:
            if text != own:
                pairs.append((context, _shuffled([own, text], *where, context.line, text)))
    return _shuffled(pairs, *where)


def _shuffled(values: Sequence[T], *where: object) -> list[T]:
    """Return ``values`` in an order that depends on ``where`` alone, the same under every version of every library."""
    order = sorted(range(len(values)), key=lambda i: hashlib.sha256(f"{where}{i}".encode()).digest())
    return [values[i] for i in order]


def _read_contexts(systems: Mapping[str, Path | str]) -> list[_Context]:
    # Only here: it imports torch, which takes seconds, and scoring needs none of it.
    from ecore.evaluation.predictions import read_predictions

    files: dict[str, list[tuple[str, int, Record]]] = {}
    for name, path in systems.items():
        records = read_predictions(path)
        lines = [number for number, _ in numbered_lines(Path(path))]
        files[name] = [(f"{path}:{n}", n, record) for n, record in zip(lines, records, strict=True)]
    first, *others = files.values()
    for other in others:
        _check_same(first, other)
    contexts = []
    for row in zip(*files.values(), strict=True):
        where, line, record = row[0]
        turns = next((turns for w, _, r in row if (turns := _turns(w, r))), None)
        if turns is None:
            raise InputError(f"{where}: no 'context', expected it in one of the systems' files")
        answers: dict[str, list[str]] = {}
        for name, (_, _, answer) in zip(files, row, strict=True):
            answers.setdefault(clean(answer["prediction"]) or "(no answer)", []).append(name)
        contexts.append(_Context(line, record.get("conv_id"), record.get("turn"), turns, answers))
    return contexts


def _check_same(one: list[tuple[str, int, Record]], other: list[tuple[str, int, Record]]) -> None:
    """Check that two files have the same contexts in the same order."""
    for (here, _, a), (there, _, b) in zip(one, other, strict=False):
        if all("conv_id" in record and "turn" in record for record in (a, b)):
            what = "conv_id and turn"
            same = (str(a["conv_id"]), str(a["turn"])) == (str(b["conv_id"]), str(b["turn"]))
        else:
            what, turns = "context", (_turns(here, a), _turns(there, b))
            if None in turns:
                raise InputError(
                    f"{there}: neither 'conv_id' and 'turn' nor 'context' to match it with {here}"
                )
            same = turns[0] == turns[1]
        if not same:
            raise InputError(f"{there}: another {what} than {here}, expected the same contexts line by line")
    if len(one) != len(other):
        short, long = sorted((one, other), key=len)
        raise InputError(
            f"{short[-1][0]}: the last of {len(short)} samples, expected {len(long)} as there are up to {long[-1][0]}"
        )


def _turns(where: str, record: Record) -> list[str] | None:
    """Return the context's turns as raters see them; None where the record has none."""
    if "context" not in record:
        return None
    context = record["context"]
    turns = [context] if isinstance(context, str) else context
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and clean(t) for t in turns):
        raise InputError(f"{where}: expected 'context' to be a list of turns, got {str(context)[:40]!r}")
    return [clean(turn) for turn in turns]


def score(folder: Path | str, sheets: Sequence[Path | str]) -> Record:
    """Score the finished sheets of the study in ``folder``; :func:`format_scores` makes a table of the scores.

    ``rating``: for each system and aspect ``mean``, ``sd`` (None for a single rating) and number of ``ratings``;
    ``spearman`` for each two raters and aspect, and their means. ``ab``: for each other system the percentages
    ``win``, ``loss`` and ``tie`` of the first, of how many ``choices``, ties of ``same_answer`` contexts included, and
    Fleiss' ``kappa`` of those that were asked. An agreement that is not defined is None.

    Raises:
        InputError: no sheets, a sheet that is incomplete or was tampered with (see
            :func:`~ecore.paper.human.sheets.read_sheet`), one rater's sheet twice, no key, or no SciPy where
            two raters rated.
    """
    key = read_key(Path(folder) / KEY)
    if not sheets:
        raise InputError("sheets: expected at least one finished sheet")
    read: dict[str, tuple[Path | str, Sheet]] = {}
    for file in sheets:
        sheet = read_sheet(file, key["sheets"])
        if sheet.name in read:
            raise InputError(f"{file}:1: sheet {sheet.name} was read already, from {read[sheet.name][0]}")
        read[sheet.name] = (file, sheet)
    result: Record = {"systems": [*key["systems"]], "contexts": len(key["contexts"])}
    for kind, count in (("rating", count_ratings), ("ab", count_choices)):
        of_kind = sorted((s for _, s in read.values() if s.kind == kind), key=lambda sheet: sheet.rater)
        if of_kind:
            result[kind] = {"raters": [sheet.rater for sheet in of_kind], **count(key, of_kind)}
    return result
