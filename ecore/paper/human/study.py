"""Human evaluation (Section 4 and Appendix I of the paper): sheets for raters, and what the finished sheets say.

A study is a folder with a subfolder of sheets for each rater, and ``key.json``, which raters never get: it tells which
system gave which response, and the checksum of every text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ecore.errors import InputError
from ecore.files import expect_new_folder, new_folder, numbered_lines, read_json, write_json
from ecore.packages import needed
from ecore.paper.human.page import write_page
from ecore.paper.human.sheets import (
    ASPECTS,
    KINDS,
    TEXTS,
    Item,
    Sheet,
    checksum,
    clean,
    read_sheet,
    write_sheet,
)

KEY = "key.json"
FORMAT = 1
OUTCOMES = ("win", "loss", "tie")

Record = dict[str, Any]
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
            file has to tell ``context``. A/B choice is between the first system and each other.
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
    # Choices of one context are apart, not in a row: what they share would tell the first system.
    pairs = []
    for context in drawn:
        own = next(text for text, names in context.answers.items() if first in names)
        for text in context.answers:
            if text != own:
                pairs.append((context, _shuffled([own, text], *where, context.line, text)))
    return _shuffled(pairs, *where)


def _shuffled(values: Sequence[T], *where: object) -> list[T]:
    """``values`` in an order that depends on ``where`` alone: the same under every version of every library."""
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
    """The context's turns as they are shown; None where the record tells none."""
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
    key = _read_key(Path(folder) / KEY)
    if not sheets:
        raise InputError("sheets: expected at least one finished sheet")
    read: dict[str, tuple[Path | str, Sheet]] = {}
    for file in sheets:
        sheet = read_sheet(file, key["sheets"])
        if sheet.name in read:
            raise InputError(f"{file}:1: sheet {sheet.name} was read already, from {read[sheet.name][0]}")
        read[sheet.name] = (file, sheet)
    result: Record = {"systems": [*key["systems"]], "contexts": len(key["contexts"])}
    for kind, count in (("rating", _count_ratings), ("ab", _count_choices)):
        of_kind = sorted((s for _, s in read.values() if s.kind == kind), key=lambda sheet: sheet.rater)
        if of_kind:
            result[kind] = {"raters": [sheet.rater for sheet in of_kind], **count(key, of_kind)}
    return result


def _read_key(path: Path) -> Record:
    """
    Raises:
        InputError: it is damaged, or no key of a study.
    """
    key = read_json(path)
    if not isinstance(key, dict) or key.get("format") != FORMAT:
        raise InputError(f"{path}: expected the key of a study, format {FORMAT}")
    parts: list[Any] = [key.get(name) for name in ("systems", "contexts", "sheets")]
    systems, contexts, sheets = parts
    wanted = {
        "systems": isinstance(systems, dict) and len(systems) > 0,
        "contexts": isinstance(contexts, dict),
        "sheets": isinstance(sheets, dict) and all(isinstance(sheet, dict) for sheet in sheets.values()),
    }
    for name, right in wanted.items():
        if not right:
            raise InputError(f"{path}: {name}: expected an object as `ecore human export` writes it")
    asked: dict[str, tuple[str, list[Any]]] = {}
    for name, sheet in sheets.items():
        kind, items = sheet.get("kind"), sheet.get("items")
        if kind not in KINDS or not isinstance(sheet.get("rater"), int) or not isinstance(items, dict):
            raise InputError(
                f"{path}: {name}: expected a sheet's kind ({' or '.join(KINDS)}), rater and items"
            )
        for item, entry in items.items():
            if not _is_item(entry, kind, [*systems], contexts):
                raise InputError(
                    f"{path}: {item}: expected its context, systems and sha256 as `ecore human export` writes them"
                )
        # Raters are asked the same, each in an order of their own.
        content = sorted(
            (entry["context"], sorted(map(sorted, entry["systems"]))) for entry in items.values()
        )
        of, expected = asked.setdefault(kind, (name, content))
        if content != expected:
            raise InputError(f"{path}: {name}: expected the contexts and systems of {of}")
    for name, content in (asked[kind] for kind in asked if kind == "rating"):
        rated = [
            (str(context), system) for context, groups in content for group in groups for system in group
        ]
        if sorted(rated) != sorted((context, system) for context in contexts for system in systems):
            raise InputError(f"{path}: {name}: expected every system once for every context")
    return key


def _is_item(entry: Any, kind: str, systems: Sequence[str], contexts: Record) -> bool:
    """Check an item of the key: every text has a checksum, every response the systems that gave it."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(n), list) for n in ("systems", "sha256")):
        return False
    groups, context = entry["systems"], entry.get("context")
    if not all(
        isinstance(group, list) and group and all(name in systems for name in group) for group in groups
    ):
        return False
    named = [*chain.from_iterable(groups)]
    return (
        type(context) is int
        and str(context) in contexts
        and len(groups) + 1 == len(entry["sha256"]) == len(TEXTS[kind])
        and len(set(named)) == len(named)
        and (kind == "rating" or sum(systems[0] in group for group in groups) == 1)
    )


def _count_ratings(key: Record, sheets: Sequence[Sheet]) -> Record:
    # By context and the systems that gave the answer, which are the same for each rater.
    tables = {}
    for sheet in sheets:
        items = key["sheets"][sheet.name]["items"]
        rows = [(items[item]["context"], items[item]["systems"][0], item) for item in sheet.answers]
        tables[sheet.rater] = [
            (names, [int(v) for v in sheet.answers[item]]) for _, names, item in sorted(rows)
        ]
    systems: Record = {}
    for name in key["systems"]:
        given = [values for table in tables.values() for names, values in table if name in names]
        systems[name] = {
            aspect: {
                "mean": fmean(values),
                "sd": stdev(values) if len(values) > 1 else None,
                "ratings": len(values),
            }
            for aspect, values in zip(ASPECTS, zip(*given, strict=True), strict=True)
        }
    pairs: list[Record] = [
        {
            "raters": [one, other],
            **{
                aspect: spearman([v[i] for _, v in tables[one]], [v[i] for _, v in tables[other]])
                for i, aspect in enumerate(ASPECTS)
            },
        }
        for one, other in combinations(tables, 2)
    ]
    means = {aspect: _mean([pair[aspect] for pair in pairs]) for aspect in ASPECTS}
    all_pairs = _mean([pair[aspect] for pair in pairs for aspect in ASPECTS])
    return {"systems": systems, "spearman": {"pairs": pairs, "mean": {**means, "all": all_pairs}}}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are defined."""
    defined = [value for value in values if value is not None]
    return fmean(defined) if defined else None


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None where either never varies.

    Raises:
        InputError: SciPy is not installed.
    """
    stats = needed("scipy.stats", "the raters' Spearman agreement", "'ecore[experiments]'")
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(stats.spearmanr(one, other).statistic)


def _count_choices(key: Record, sheets: Sequence[Sheet]) -> Record:
    first, *others = key["systems"]
    contexts = len(key["contexts"])
    # [wins, losses, ties] of the first system, by context and other system.
    counts: dict[str, dict[int, list[int]]] = {name: {} for name in others}
    for sheet in sheets:
        for item, (choice,) in sheet.answers.items():
            entry = key["sheets"][sheet.name]["items"][item]
            own = next(side for side, names in enumerate(entry["systems"]) if first in names)
            outcome = 2 if choice == "tie" else int("AB".index(choice) != own)
            for name in entry["systems"][1 - own]:
                counts[name].setdefault(entry["context"], [0, 0, 0])[outcome] += 1
    pairs = []
    for name in others:
        asked = np.array([*counts[name].values()], dtype=np.int64).reshape(-1, 3)
        same = contexts - len(asked)
        total = asked.sum(0) + np.array([0, 0, same * len(sheets)])
        percent = (100.0 * total / total.sum()).tolist()
        pairs.append(
            {
                "first": first,
                "other": name,
                **dict(zip(OUTCOMES, percent, strict=True)),
                "choices": int(total.sum()),
                "same_answer": same,
                "kappa": fleiss_kappa(asked),
            }
        )
    return {"pairs": pairs}


def fleiss_kappa(counts: npt.ArrayLike) -> float | None:
    """Fleiss' kappa of ``counts`` [items, categories]: how many raters put each item in each category.

    1 is perfect agreement, 0 that of chance. None without items or with one rater, and where all chose one category
    throughout, which leaves nothing that chance could explain.
    """
    counts = np.asarray(counts, dtype=np.float64)
    raters = counts[0].sum() if len(counts) else 0
    if raters < 2:
        return None
    agreed = float(((counts**2).sum(1) - raters).mean() / (raters * (raters - 1)))
    chance = float((counts.sum(0) ** 2).sum() / counts.sum() ** 2)
    return (agreed - chance) / (1 - chance) if chance < 1 else None


def format_scores(result: Record) -> str:
    """:func:`score`'s result as tables to read."""
    lines = [f"{result['contexts']:,} contexts, systems {', '.join(result['systems'])}"]
    width = max(len("average"), *(len(name) for name in result["systems"]))
    if "rating" in result:
        rating = result["rating"]
        lines += ["", f"Rating from 1 to 5, mean ± standard deviation, {_raters(rating)}"]
        lines.append(
            f"{'':<{width}}" + "".join(f"{aspect.title():>16}" for aspect in ASPECTS) + f"{'ratings':>10}"
        )
        for name, aspects in rating["systems"].items():
            cells = [f"{_number(a['mean'])} ± {_number(a['sd'])}" for a in aspects.values()]
            count = next(iter(aspects.values()))["ratings"]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells) + f"{count:>10,}")
        if rating["spearman"]["pairs"]:
            average = rating["spearman"]["mean"]
            lines += ["", f"Spearman correlation between raters, average {_number(average['all'])}"]
            rows = [("{} and {}".format(*pair["raters"]), pair) for pair in rating["spearman"]["pairs"]]
            for name, row in [*rows, ("average", average)]:
                lines.append(
                    f"{name:<{width}}" + "".join(f"{_number(row[aspect]):>16}" for aspect in ASPECTS)
                )
    if "ab" in result:
        lines += ["", f"A/B choice, {result['systems'][0]} against each other, {_raters(result['ab'])}"]
        titles = ("Win %", "Loss %", "Tie %", "choices", "same answer", "Fleiss' kappa")
        lines.append(f"{'':<{width}}" + "".join(f"{title:>14}" for title in titles))
        for pair in result["ab"]["pairs"]:
            cells = [f"{pair[outcome]:.1f}" for outcome in OUTCOMES]
            cells += [f"{pair['choices']:,}", f"{pair['same_answer']:,}", _number(pair["kappa"])]
            lines.append(f"{pair['other']:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _raters(part: Record) -> str:
    return f"rater{'s' if len(part['raters']) > 1 else ''} {', '.join(map(str, part['raters']))}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
