"""The training benchmark's results as tables and as a plot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks import harness

RELEASED_CODE = {"released": (20.0, 37.0)}
"""u a step that the authors' released code takes on two CPU cores, batch 16: measured once, not by this script."""


def plot(results: list[dict[str, Any]], preset: str, path: Path, device: str = "cpu") -> None:
    """Bars of a step's cost, one a configuration: medians, which a shared machine's slow moments do not move.

    In u on a CPU, in milliseconds on a GPU.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in reversed(results) if "refused" not in row]
    figure = Figure(figsize=(7, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    costs = [r["u_median"] if device == "cpu" else 1e3 * _median(r) for r in rows]
    bars = axes.barh([r["configuration"] for r in rows], costs, color="#35618f", height=0.65)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    if preset in RELEASED_CODE and device == "cpu":
        low, high = RELEASED_CODE[preset]
        axes.axvspan(low, high, color="#c98b2b", alpha=0.35, hatch="//", label="the authors' released code")
        figure.legend(loc="outside upper right", frameon=False)
    axes.set_xlabel(f"{'u' if device == 'cpu' else 'ms'} a training step, median")
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
    about = f"{document['preset']} on {device}, batches of 16, {document['data']}; "
    told = [about + f"u = {harness.duration(document['u_seconds'])}"]
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
                f"{result['u']:.2f}",
                harness.duration(timing["median"]),
                f"{harness.duration(timing['p20'])} – {harness.duration(timing['p80'])}",
                "–" if result["speedup_median"] is None else f"{result['speedup_median']:.2f}",
                f"{result['peak_memory_mib']:,.0f} MiB" if "peak_memory_mib" in result else "",
                *([harness.duration(result["warm_up_seconds"])] if device == "cuda" else []),
            ]
        )
    header = ["configuration", "u (mean)", "median", "p20 – p80", "plain / this", "memory"]
    told.append(harness.table([*header, "first passes"] if device == "cuda" else header, rows))
    told += [f"- {name}: {why}" for name, why in refused.items()]
    if "parts" in document:
        parts = document["parts"]
        rows = [[p, *(harness.duration(parts[n][p]) for n in parts)] for p in parts["plain"]]
        rows.append(["sum", *(harness.duration(sum(parts[n].values())) for n in parts)])
        told += ["where a step's time goes (under the profiler)"]
        told += [harness.table(["part", "plain PyTorch", "all"], rows)]
    if "growth" in document:
        rows = [
            [
                str(g["batch"]),
                str(g["context_words"] or "as in the data"),
                harness.duration(g["seconds_a_sample"]),
            ]
            for g in document["growth"]
        ]
        told += ["how it grows (all on)", harness.table(["batch", "context words", "a sample"], rows)]
    return "\n\n".join(told)
