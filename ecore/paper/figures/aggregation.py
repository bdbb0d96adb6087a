"""Figure 6: emotion features before and after correlation-aware aggregation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ecore.paper.figures.dialogue import Array, Trace
from ecore.paper.figures.drawing import (
    COLORS,
    GREY,
    INK,
    PALE,
    heat_map,
    heat_map_bar,
    name_ticks,
    new_figure,
    plain,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def draw_aggregation(trace: Trace) -> Figure:
    """Figure 6: the features before aggregation, what aggregates them (Eq. 8), after it, and what is perceived.

    A row is an emotion through all panels, the most probable first. The last panel answers the paper's question, which
    emotion is predicted without aggregation and with it: h^g is a feature of Eq. 9, whose largest entry need not be the
    predicted emotion.
    """
    order = np.argsort(-trace.perceived, kind="stable")
    names = [trace.emotions[i] for i in order]
    before, after = trace.before[order], trace.after[order]
    figure = new_figure(11.0, 0.165 * len(names) + 1.7)
    bottom, top = 0.85 / figure.get_figheight(), 1 - 0.75 / figure.get_figheight()
    first, edges, second, probabilities = (
        figure.add_axes((left, bottom, width, top - bottom))
        for left, width in ((0.085, 0.145), (0.25, 0.37), (0.69, 0.145), (0.855, 0.135))
    )
    bar = figure.add_axes((0.627, bottom + 0.25 * (top - bottom), 0.01, 0.5 * (top - bottom)))

    span = 1.1 * max(float(np.abs(before).max()), float(np.abs(after).max()), 1e-6)
    _features(first, before, "(a) before\n$\\Sigma_i\\, E_i^{w-e}$", span)
    _features(second, after, "(c) after: $h^g$\n(black line: before)", span, before)
    own = np.eye(len(names), dtype=bool)
    aggregating = np.where(own, np.nan, trace.emotion_edges[np.ix_(order, order)])
    image = heat_map(edges, aggregating, float(np.abs(aggregating[~own]).max(initial=0)) or 1.0)
    edges.plot(range(len(names)), range(len(names)), "x", color=GREY, markersize=3.5, markeredgewidth=0.7)
    edges.set_title(
        "(b) $E^{e-e}$: what a row receives from columns\n(x: own, not drawn; –: negative)", fontsize=8
    )
    heat_map_bar(figure, image, bar, "")
    _probabilities(probabilities, 100 * trace.perceived_before[order], 100 * trace.perceived[order])

    name_ticks(edges, "x", names, rotation=90, fontsize=7)
    name_ticks(first, "y", names, fontsize=7)
    for axes in (edges, second, probabilities):
        axes.set_yticks([])
    for axes in (first, second, probabilities):
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.spines.left.set_visible(False)
        if trace.emotion in names:
            row = names.index(trace.emotion)
            axes.axhspan(row - 0.5, row + 0.5, color=PALE, linewidth=0, zorder=0)
    for label in (*first.get_yticklabels(), *edges.get_xticklabels()):
        label.set_fontweight("bold" if label.get_text() == trace.emotion else "normal")
    plain(figure.text(0.01, 1.0, f"Correlation-aware aggregation   {trace.heading}", fontsize=9, va="top"))
    return figure


def _features(axes: Axes, values: Array, title: str, span: float, earlier: Array | None = None) -> None:
    """Bars from 0, the largest dark and with its value; lines where ``earlier`` ones ended."""
    best = int(values.argmax())
    colors = [COLORS[0] if i == best else "#9ecae1" for i in range(len(values))]
    axes.barh(range(len(values)), values, color=colors, edgecolor=INK, linewidth=0.4, height=0.75)
    axes.axvline(0, color=INK, linewidth=0.6)
    ends = [0.0, float(values[best])]
    if earlier is not None:
        rows = np.arange(len(values))
        axes.vlines(earlier, rows - 0.45, rows + 0.45, color=INK, linewidth=1.4)
        ends.append(float(earlier[best]))
    axes.text(max(ends), best, f" {values[best]:.2f}", fontsize=7, va="center")
    axes.set_xlim(-span, 1.3 * span)
    axes.set_title(title, fontsize=8)


def _probabilities(axes: Axes, before: Array, after: Array) -> None:
    rows = np.arange(len(after))
    axes.hlines(rows, before, after, color=GREY, linewidth=1.2)
    axes.plot(
        before, rows, "o", markerfacecolor="white", markeredgecolor=INK, markersize=5.5, label="from (a)"
    )
    axes.plot(after, rows, "o", color=COLORS[0], markersize=3, label="from (c)")
    best = max(float(before.max()), float(after.max()))
    axes.set_xlim(-0.06 * best, 1.15 * best)
    axes.set_title("(d) perceived, %\nSoftmax($h^m$)", fontsize=8)
    axes.legend(loc="lower right", fontsize=7, frameon=False)
