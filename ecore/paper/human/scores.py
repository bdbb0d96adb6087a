"""Scores of a study's finished sheets: means, wins, the raters' agreement, and tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from ecore.packages import needed
from ecore.paper.human.key import Record
from ecore.paper.human.sheets import ASPECTS, Sheet

OUTCOMES = ("win", "loss", "tie")


def count_ratings(key: Record, sheets: Sequence[Sheet]) -> Record:
    """Return each system's mean and deviation by aspect, and how far two raters agree (Spearman)."""
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
    """Return the mean of those that are defined."""
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


def count_choices(key: Record, sheets: Sequence[Sheet]) -> Record:
    """Return the first system's wins, losses and ties against each other system, and the raters' agreement (kappa)."""
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
    """Format what :func:`ecore.paper.human.study.score` returns as tables to read."""
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
