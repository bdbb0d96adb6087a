"""The training benchmark's results as tables and as a plot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks import harness


def plot(results: list[dict[str, Any]], preset: str, path: Path, device: str = "cpu") -> None:
    """Draw how often a step fits into plain PyTorch's, one bar a configuration; without plain PyTorch, milliseconds.

    Medians of ratios of steps in turn: slow moments of a shared machine do not move them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in reversed(results) if "refused" not in row]
    figure = Figure(figsize=(7, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    relative = all(row["speedup_median"] for row in rows)
    lengths = [row["speedup_median"] if relative else 1e3 * _median(row) for row in rows]
    bars = axes.barh([row["configuration"] for row in rows], lengths, color="#35618f", height=0.65)
    axes.bar_label(bars, fmt="%.2f" if relative else "%.1f", padding=3)
    quantity = "plain PyTorch's time of a training step / this" if relative else "ms a training step, median"
    axes.set_xlabel(f"{quantity} ({preset}, {device})")
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "ecore"}):  # the same results make the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _median(result: dict[str, Any]) -> float:
    """Of a result just measured, or read back."""
    timing = result["timing"]
    return timing["median"] if isinstance(timing, dict) else timing.median


def report(document: dict[str, Any]) -> str:
    """All tables of what was measured (so far), or read back, as text."""
    device = document.get("device", "cpu")
    blocks = [f"{document['preset']} on {device}, batches of 16, {document['data']}"]
    rows = []
    refused = {r["configuration"]: r["refused"] for r in document["configurations"] if "refused" in r}
    for result in document["configurations"]:
        if "refused" in result:
            continue
        timing = result["timing"]
        timing = timing if isinstance(timing, dict) else dataclasses.asdict(timing)
        rows.append(
            [
                result["configuration"],
                harness.duration(result["mean_seconds"]),
                harness.duration(timing["median"]),
                f"{harness.duration(timing['p20'])} – {harness.duration(timing['p80'])}",
                "–" if result["speedup_median"] is None else f"{result['speedup_median']:.2f}",
                f"{result['peak_memory_mib']:,.0f} MiB" if "peak_memory_mib" in result else "",
                *([harness.duration(result["warm_up_seconds"])] if device == "cuda" else []),
            ]
        )
    header = ["configuration", "mean", "median", "p20 – p80", "plain / this", "memory"]
    blocks.append(harness.table([*header, "first passes"] if device == "cuda" else header, rows))
    blocks += [f"- {name}: {why}" for name, why in refused.items()]
    if "parts" in document:
        parts = document["parts"]
        rows = [[p, *(harness.duration(parts[n][p]) for n in parts)] for p in parts["plain"]]
        rows.append(["sum", *(harness.duration(sum(parts[n].values())) for n in parts)])
        blocks += ["where a step's time goes (under the profiler)"]
        blocks += [harness.table(["part", "plain PyTorch", "all"], rows)]
    if "growth" in document:
        rows = [
            [
                str(g["batch"]),
                str(g["context_words"] or "as in the data"),
                harness.duration(g["seconds_a_sample"]),
            ]
            for g in document["growth"]
        ]
        blocks += ["how it grows (all on)", harness.table(["batch", "context words", "a sample"], rows)]
    return "\n\n".join(blocks)
