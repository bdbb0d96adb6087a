"""Shared parts of all figures: one style, readable in grey print and by colour-blind readers; reproducible files."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt

from ecore.errors import InputError
from ecore.files import atomic_path
from ecore.packages import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.text import Text

INK, GREY, PALE = "#222222", "#767676", "#d9d9d9"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Okabe and Ito's palette, which readers with the common kinds of colour-blindness can distinguish."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
"""One for each colour, for print without colour."""
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # TrueType: text stays text, and publishers accept it
}
PNG_DPI = 200

MINUS = 0.04
"""Cells under minus this share of the largest weight carry a minus sign, for print without colour."""
DARK = 0.3
"""Cells over this share of it are so dark that the sign is white."""

P = ParamSpec("P")
R = TypeVar("R")


class NotDrawn(InputError):
    """A run or its data lack what one figure needs; others can still be drawn."""


def check_matplotlib() -> None:
    """
    Raises:
        InputError: matplotlib is not installed.
    """
    needed("matplotlib.figure", "drawing figures", "'ecore[figures]'")


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` in our style, whatever the user's matplotlibrc says; theirs is back when it returns."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        check_matplotlib()
        from matplotlib import style

        with style.context(["default", STYLE]):
            return function(*args, **kwargs)

    return wrapped


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches; it belongs to no window and no pyplot state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def plain(text: Text) -> Text:
    """The same text, with every ``$`` in it a dollar."""
    text.set_parse_math(False)
    return text


def name_ticks(axes: Axes, which: str, labels: list[str], **style: Any) -> None:
    """One tick at 0, 1, ... for each of ``labels``, along ``which`` ("x" or "y"), without tick marks."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(range(len(labels)), labels, **style)
    axis.set_tick_params(length=0)
    for label in axis.get_ticklabels():
        plain(label)


def signed_root_norm(most: float) -> Normalize:
    """Colours by the signed square root of a weight between -most and most.

    A few weights are far larger than all others; on a linear scale one would see those alone.
    """
    from matplotlib.colors import FuncNorm

    return FuncNorm(
        (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x)), -most, most
    )


def heat_map(axes: Axes, weights: npt.NDArray[np.floating], most: float, lines: bool = False) -> QuadMesh:
    """Signed weights as cells, rows down; NaN is left white. Orange is positive; violet with a sign is negative."""
    corners = [np.arange(size + 1) - 0.5 for size in reversed(weights.shape)]
    image = axes.pcolormesh(*corners, weights, cmap="PuOr_r", norm=signed_root_norm(most))
    if lines:
        image.set(edgecolor=PALE, linewidth=0.25)
    for color, (low, high) in {INK: (-DARK, -MINUS), "white": (-np.inf, -DARK)}.items():
        rows, columns = np.nonzero((weights >= low * most) & (weights < high * most))
        axes.plot(columns, rows, linestyle="none", marker="_", markersize=4, markeredgewidth=0.9, color=color)
    axes.set_xlim(-0.5, weights.shape[1] - 0.5)
    axes.set_ylim(len(weights) - 0.5, -0.5)
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.6)
    return image


def heat_map_bar(figure: Figure, image: QuadMesh, axes: Axes, label: str) -> None:
    """The scale of :func:`heat_map` in ``axes``, with ticks where the square root leaves room for them."""
    most = float(cast(float, image.norm.vmax))
    ticks = [share * most for share in (-1.0, -0.25, -0.05, 0.0, 0.05, 0.25, 1.0)]
    bar = figure.colorbar(image, cax=axes, ticks=ticks, label=label)
    bar.minorticks_off()
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_linewidth(0.4)


@styled
def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``figure`` to ``folder`` as NAME.pdf and NAME.png, the same bytes for the same figure."""
    kinds = {"pdf": ("pdf", {"CreationDate": None}), "png": ("agg", {})}
    written = []
    for kind, (backend, metadata) in kinds.items():
        path, content = folder / f"{name}.{kind}", io.BytesIO()  # matplotlib breaks down where a disk is full
        figure.savefig(
            content,
            format=kind,
            backend=backend,
            dpi=PNG_DPI,
            metadata=metadata,
            bbox_inches="tight",
            pad_inches=0.06,
        )
        with atomic_path(path) as temporary:
            temporary.write_bytes(content.getvalue())
        written.append(path)
    return written
