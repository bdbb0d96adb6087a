"""The operators' results as tables, and read back from their file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.operators import candidates


def load(path: Path) -> list[dict[str, Any]]:
    """The results in a JSON file, as :func:`run` gave them."""
    results = harness.read_results(path)
    for entry in (entry for result in results for entry in result["candidates"].values()):
        entry |= {kind: harness.Timing(**entry[kind]) for kind in ("timing", "replay") if kind in entry}
    return results


def report(results: Sequence[dict[str, Any]]) -> str:
    """A table an operator, losses marked, and below each why candidates are missing."""
    parts = []
    for operator in dict.fromkeys(result["operator"] for result in results):
        mine = [result for result in results if result["operator"] == operator]
        measured = [result for result in mine if any("timing" in c for c in result["candidates"].values())]
        parts.append(f"## {operator}\n")
        if measured:
            parts.append(harness.table(HEADER, [show(result) for result in measured]) + "\n")
        notes: dict[str, list[str]] = {}
        for result in mine:
            shape = f"{result['nodes']} {result['masks']} {result['precision']}"
            at = f"{shape} {result['direction']} depth {result['depth']}"
            whys = {n: c["refused"] for n, c in result["candidates"].items() if "refused" in c}
            if "refused" in result:
                whys["not measured"] = result["refused"]
            for name, why in whys.items():
                notes.setdefault(f"{name}: {why}", []).append(at)
        for note, places in notes.items():
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            parts.append(f"- {note} [{'; '.join(places[:3])}{more}]")
        parts.append("")
    return "\n".join(parts)


HEADER = [
    *(
        "N",
        "words",
        "type",
        "pass",
        "depth",
        "ours (p20 – p80)",
        "replayed",
        "of floor",
        "launches",
        "memory",
    ),
    *(f"{rival} / ours: medians (minima)" for rival in candidates.NAMES[1:]),
    "memory, reference / ours",
    "",
]


def show(result: dict[str, Any]) -> list[str]:
    """One line of the table; after a semicolon ratios of replayed graphs; without ours, rivals' times instead."""
    entries, ratios = result["candidates"], result["ratios"]
    ours = entries.get("fused", {})
    passes = {"forward": "F", "forward+backward": "F+B"}[result["direction"]]
    cells = [f"{result['nodes']:,}", result["masks"], result["precision"], passes, str(result["depth"])]
    if "timing" in ours:
        timing = ours["timing"]
        low, middle, high = map(harness.duration, (timing.p20, timing.median, timing.p80))
        best = "replay" if "replay" in ours else "timing"
        cells += [
            f"{middle} ({low} – {high})",
            harness.duration(ours["replay"].median) if "replay" in ours else "–",
            f"{100 * ours[f'{best}_floor_reached']:.1f} % ({result['floor']['bound']})",
            str(ours.get("launches", "–")),
            harness.memory(ours["peak_memory"]),
        ]
    else:
        cells += ["–"] * 5
    for rival in candidates.NAMES[1:]:
        ratio = ratios.get(rival)
        if ratio:
            both = [
                f"{ratio[k]:.2f} ({ratio[f'{k}_minimum']:.2f})" for k in ("timing", "replay") if k in ratio
            ]
            cells.append("; ".join(both))
        elif "timing" in entries.get(rival, {}):
            cells.append(harness.duration(entries[rival]["timing"].median))
        else:
            cells.append("–")
    cells.append(f"{ratios['reference']['memory']:.1f}" if "reference" in ratios else "–")
    lost = [name for name, ratio in ratios.items() if min(ratio["timing"], ratio.get("replay", 9.0)) < 1]
    cells.append(f"LOST to {' and '.join(lost)}" if lost else "")
    return cells
