"""The generation benchmark's results as tables and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report(result: Mapping[str, Any], words_each: int) -> str:
    """The tables, as Markdown; ``words_each``: of every answer that was compared."""

    def cells(seconds: float) -> list[str]:
        return [harness.duration(seconds), f"{1 / seconds:,.0f}"]

    blocks = []
    for row in result["compared"]:
        words = row["batch"] * words_each
        lines = [[name, *cells(timing["median"] / words)] for name, timing in row["timings"].items()]
        blocks.append(
            f"Batch {row['batch']}, greedy, of a word:\n\n" + harness.table(("", "time", "words/s"), lines)
        )
        if row["parts"]:
            before, after = row["parts"].values()
            lines = [
                [part, *(harness.duration(part_of[part] / words) for part_of in (before, after))]
                for part in after
            ]
            blocks.append(
                f"Batch {row['batch']}, where a word's time goes:\n\n"
                + harness.table(("", *row["parts"]), lines)
            )
    for name, times in result["growth"].items():
        blocks.append(
            harness.table((name, "time a word", "words/s"), [[f"{k:,}", *cells(v)] for k, v in times.items()])
        )
    return "\n\n".join(blocks)


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how generation grows, one colour a result: with contexts at once, a context's length, and what is said.

    Args:
        results: of the benchmark, as measured or read back, each of another preset; at most three.
        path: ``.svg`` or ``.png``.

    Raises:
        ValueError: more than three results.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "ecore"}):  # the same results make the same file
        drawn(results).savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def drawn(results: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure that :func:`plot` writes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    throughput, cost = figure.subplots(1, 2)
    # Colours that colour-blind readers tell apart, and a marker each.
    styles = (("#35618f", "o"), ("#c98b2b", "s"), ("#3f7d5b", "^"))
    if len(results) > len(styles):
        raise ValueError(f"expected at most {len(styles)} results, got {len(results)}")
    for result, (color, marker) in zip(results, styles, strict=False):
        grown, name = result["growth"], result["preset"]
        look = {"color": color, "marker": marker}
        throughput.plot(*_line(grown["batch"], lambda s: 1.0 / s), label=name, **look)
        for key, style in (("context words", "-"), ("words already said", ":")):
            cost.plot(*_line(grown[key], lambda s: 1e3 * s), style, label=f"{name}, {key}", **look)
    throughput.set(xscale="log", yscale="log", xlabel="contexts at once", ylabel="words a second")
    cost.set(xscale="log", xlabel="words, one context", ylabel="ms a word", ylim=(0, None))
    throughput.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    for axes in (throughput, cost):
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    for axis in (throughput.xaxis, throughput.yaxis, cost.xaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


def _line(seconds: Mapping[Any, float], value: Callable[[float], float]) -> tuple[list[int], list[float]]:
    """Sizes, which JSON makes strings of, and the values there."""
    return [int(size) for size in seconds], [value(s) for s in seconds.values()]
