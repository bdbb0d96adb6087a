"""Figure 4: emotions that occur together, in the data and in the model's learned R."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ecore.model.perceiver import Perceiver
from ecore.paper.figures.drawing import COLORS, GREY, INK, MARKERS, NotDrawn, new_figure, plain, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ecore.model.base import EmpatheticModel

Matrix = npt.NDArray[np.float64]

EDGE = 0.3
"""Edges over this share of the largest weight are drawn, as in the paper."""
GROUPS = len(COLORS) - 1
"""Groups with a colour of their own; the last colour is for what is left."""


@torch.no_grad()
def learned_correlation(model: EmpatheticModel) -> Matrix:
    """The model's R, [P, P], with a diagonal of 0 in place of its constant 1.

    Raises:
        NotDrawn: a model without it.
    """
    if not isinstance(model.perceiver, Perceiver):  # strategy none, with a head for emotions or without
        raise NotDrawn("the run learned no emotion correlation (--strategy none)")
    weights = model.perceiver.correlation().double().cpu().numpy()
    np.fill_diagonal(weights, 0)
    return weights


def normalized(weights: Matrix) -> Matrix:
    """``weights`` over their largest entry off the diagonal; all 0 where none is positive."""
    off = np.where(np.eye(len(weights), dtype=bool), 0.0, weights)
    most = off.max(initial=0.0)
    return off / most if most > 0 else np.zeros_like(off)


def edges(weights: Matrix) -> dict[tuple[int, int], float]:
    """Pairs i < j whose normalised weight is over :data:`EDGE`, with that weight."""
    scaled = normalized(weights)
    rows, columns = np.nonzero(np.triu(scaled > EDGE, 1))
    return {(i, j): float(scaled[i, j]) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)}


def groups(weights: Matrix) -> list[list[int]]:
    """Emotions that go together: communities of largest modularity among the positive weights, largest first.

    Modularity compares each pair with what the two emotions' totals let expect, so an emotion whose words are common
    does not draw all others to it. Emotions without any weight come last, each alone.
    """
    import networkx as nx

    graph = nx.from_numpy_array(np.maximum(normalized(weights), 0.0))
    linked = graph.subgraph([node for node in graph if graph.degree(node)])
    found = (
        nx.community.greedy_modularity_communities(linked, weight="weight")
        if linked.number_of_edges()
        else []
    )
    alone = [[node] for node in graph if not graph.degree(node)]
    return sorted((sorted(group) for group in found), key=lambda g: (-len(g), g)) + alone


def circle_order(weights: Matrix, grouped: Sequence[Sequence[int]]) -> list[int]:
    """The emotions' places around the circle: group by group, within each by the Fiedler vector.

    The eigenvector of the graph Laplacian's second smallest eigenvalue puts what is strongly linked side by side, so
    that strong edges are short.
    """
    scaled = np.maximum(normalized(weights), 0.0)
    order: list[int] = []
    for group in grouped:
        inner = scaled[np.ix_(group, group)]
        vector = np.linalg.eigh(np.diag(inner.sum(1)) - inner)[1][:, min(1, len(group) - 1)]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])  # eigenvectors have no sign of their own
        order += [group[i] for i in np.argsort(vector.round(9), kind="stable")]
    return order


def rank_correlation(a: Matrix, b: Matrix) -> float | None:
    """Spearman's rank correlation of the weights of all pairs i < j; None where one graph is all equal."""
    pairs = np.triu_indices(len(a), 1)
    first, second = (_ranks(weights[pairs]) for weights in (a, b))
    if min(np.ptp(r) if r.size else 0 for r in (first, second)) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Matrix) -> Matrix:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


@dataclass(frozen=True)
class Correlations:
    """Figure 4's two graphs.

    Attributes:
        emotions: P names.
        model: [P, P], R off its diagonal.
        data: [P, P] co-occurrence counts, None where there is no data.
        dialogues: how many dialogues were counted.
    """

    emotions: tuple[str, ...]
    model: Matrix
    data: Matrix | None = None
    dialogues: int = 0

    def agreement(self) -> dict[str, float | None] | None:
        """Compare the graphs: ``shared_edges``, ``rank_correlation`` over all pairs, and ``expected_shared``,
        the shared edges that chance gives two graphs of as many edges; None without data."""
        if self.data is None:
            return None
        ours, theirs = edges(self.model), edges(self.data)
        pairs = len(self.emotions) * (len(self.emotions) - 1) / 2
        return {
            "shared_edges": len(ours.keys() & theirs.keys()),
            "expected_shared": len(ours) * len(theirs) / max(pairs, 1),
            "rank_correlation": rank_correlation(self.model, self.data),
        }

    def to_json(self) -> dict[str, Any]:
        """The matrices, and the edges that are drawn by name."""
        data: dict[str, Any] = {"emotions": self.emotions, "dialogues": self.dialogues}
        for name, weights in (("model", self.model), ("data", self.data)):
            if weights is not None:
                drawn = [[self.emotions[i], self.emotions[j], w] for (i, j), w in edges(weights).items()]
                data[name] = {"weights": weights.tolist(), "edges": drawn}
        return data | {"agreement": self.agreement()}


@styled
def draw_correlations(correlations: Correlations) -> Figure:
    """Figure 4: the data's graph next to the model's, each emotion with the same place and colour in both.

    Places and colours come from the data (from the model where there is none).
    """
    names, model, data = correlations.emotions, correlations.model, correlations.data
    grouped = groups(model if data is None else data)
    order = circle_order(model if data is None else data, grouped)
    panels = [("learned R of the model", model, None if data is None else data)]
    if data is not None:
        panels.insert(0, (f"co-occurrence in {correlations.dialogues:,} dialogues", data, model))
    figure = new_figure(5.6 * len(panels), 6.2)
    for column, (title, weights, other) in enumerate(panels):
        axes = figure.add_axes(((column + 0.01) / len(panels), 0.09, 0.98 / len(panels), 0.84))
        letter = f"({'ab'[column]}) " if data is not None else ""
        drawn = edges(weights)
        axes.set_title(f"{letter}{title}: {len(drawn)} edges", fontsize=10)
        _graph(axes, names, order, grouped, drawn, None if other is None else edges(other))
    caption = f"Edges: weight over {EDGE} of the largest; the wider and darker, the heavier."
    if (agreement := correlations.agreement()) is not None:
        caption += (
            " Solid: in both graphs; dashed: in this one only.\n"
            f"{agreement['shared_edges']} edges in both (chance: {agreement['expected_shared']:.1f}); "
            f"rank correlation over all pairs {_told(agreement['rank_correlation'])}."
        )
    source = "data" if data is not None else "model"
    figure.text(
        0.02,
        0.01,
        f"{caption} Colour and marker: groups of emotions in the {source}.",
        fontsize=8,
        va="bottom",
    )
    return figure


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _graph(
    axes: Axes,
    names: Sequence[str],
    order: Sequence[int],
    grouped: Sequence[Sequence[int]],
    drawn: dict[tuple[int, int], float],
    other: dict[tuple[int, int], float] | None,
) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    angle = {node: np.pi / 2 - 2 * np.pi * place / len(order) for place, node in enumerate(order)}
    place = {node: np.array([np.cos(a), np.sin(a)]) for node, a in angle.items()}
    for (i, j), weight in sorted(drawn.items(), key=lambda item: item[1]):
        # Bent towards the middle, so that an edge between neighbours leaves the rim and chords part.
        curve = Path(
            [place[i], 0.45 * (place[i] + place[j]) / 2, place[j]], [Path.MOVETO, Path.CURVE3, Path.CURVE3]
        )
        strength = (weight - EDGE) / (1 - EDGE)
        grey = str(0.62 - 0.62 * strength)
        style = "solid" if other is None or (i, j) in other else (0, (3.5, 1.6))
        axes.add_patch(
            PathPatch(
                curve, fill=False, edgecolor=grey, linewidth=0.9 + 2.6 * strength, linestyle=style, zorder=1
            )
        )
    touched = {node for pair in drawn for node in pair}
    for number, group in enumerate(grouped):
        kind = min(number, GROUPS)
        marked: dict[str, Any] = {
            "color": COLORS[kind],
            "markeredgecolor": INK,
            "markeredgewidth": 0.6,
            "markersize": 8,
        }
        for node in group:
            x, y = place[node]
            axes.plot(x, y, MARKERS[kind], zorder=2, **marked)
            degrees = np.degrees(angle[node])
            left = x < -1e-9
            label = axes.text(
                1.07 * x,
                1.07 * y,
                names[node],
                rotation=degrees + 180 if left else degrees,
                rotation_mode="anchor",
                ha="right" if left else "left",
                va="center",
                fontsize=9,
                color=INK if node in touched else GREY,
            )
            plain(label)
    axes.set_xlim(-1.6, 1.6)
    axes.set_ylim(-1.55, 1.55)
    axes.set_aspect("equal")
    axes.axis("off")
