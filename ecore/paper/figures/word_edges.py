"""Figure 5: the edges from a dialogue's words to the emotions, as a heat map."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ecore.paper.figures.dialogue import Trace
from ecore.paper.figures.drawing import INK, heat_map, heat_map_bar, name_ticks, new_figure, plain, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

WORDS_A_BLOCK = 48
"""Words in one block of the heat map before the next block begins to its right."""
ACROSS = 2
"""Blocks in a row: as wide as a page."""
LONGEST_WORD = 18
"""Letters of a word that are shown: an address would push all else aside."""
# Inches.
CELL = 0.165  # what a line of 7 points needs
LETTER = 0.062  # of a word of 7 points
TURN = 0.3  # the turn's name, left of the words
HEADING = 0.25
BAR = 0.95  # the colour scale, right of all
LEAST_BAR = 1.5  # of its height: what its numbers need


def blocks(words: int) -> list[slice]:
    """Cut a dialogue of ``words`` words into blocks of about equal length, at most :data:`WORDS_A_BLOCK` each."""
    count = math.ceil(words / WORDS_A_BLOCK)
    ends = [round(words * i / count) for i in range(count + 1)]
    return [slice(begin, end) for begin, end in pairwise(ends)]


@styled
def draw_word_edges(trace: Trace) -> Figure:
    """Figure 5: words down, emotions across; long dialogues continue in the next column."""
    cut = blocks(len(trace.words))
    shown = [word if len(word) <= LONGEST_WORD else f"{word[: LONGEST_WORD - 1]}…" for word in trace.words]
    across = min(ACROSS, len(cut))
    width = CELL * len(trace.emotions)
    height = CELL * max(part.stop - part.start for part in cut)
    side = LETTER * max(map(len, shown)) + TURN
    head = LETTER * max(map(len, trace.emotions)) + 0.1
    page_width = across * (side + width) + BAR
    rows_height = math.ceil(len(cut) / across) * (head + height)
    page_height = HEADING + max(rows_height, head + LEAST_BAR)
    figure = new_figure(page_width, page_height)

    def place(left: float, top: float, wide: float, tall: float) -> Axes:
        """Axes at these inches from the left and the top of the page."""
        box = (left / page_width, 1 - (top + tall) / page_height, wide / page_width, tall / page_height)
        return figure.add_axes(box)

    most = float(np.abs(trace.word_edges).max()) or 1.0
    for i, part in enumerate(cut):
        row, column = divmod(i, across)
        left, top = column * (side + width) + side, HEADING + row * (head + height) + head
        axes = place(left, top, width, CELL * (part.stop - part.start))
        image = _block(axes, trace, shown, part, most)
    bar = place(page_width - BAR + 0.15, HEADING + head, 0.12, max(LEAST_BAR, min(height, 3.0)))
    heat_map_bar(figure, image, bar, "edge weight (– in a cell: negative)")
    plain(figure.text(0.01, 1.0, f"Word-to-emotion edges   {trace.heading}", fontsize=9, va="top"))
    return figure


def _block(axes: Axes, trace: Trace, shown: list[str], part: slice, most: float) -> QuadMesh:
    image = heat_map(axes, trace.word_edges[part], most, lines=True)
    axes.xaxis.tick_top()
    name_ticks(axes, "x", list(trace.emotions), rotation=90, fontsize=7)
    name_ticks(axes, "y", shown[part], fontsize=7)
    for label, emotion in zip(axes.get_xticklabels(), trace.emotions, strict=True):
        label.set_fontweight("bold" if emotion == trace.emotion else "normal")
    turns = trace.turns[part]
    for i, turn in enumerate(turns):
        begins = i == 0 or turn != turns[i - 1]
        if begins and i:
            axes.axhline(i - 0.5, color=INK, linewidth=0.9)
        if begins and turn >= 0:
            who = f"{'S' if turn % 2 == 0 else 'L'}{turn // 2 + 1}"
            beside = -(LETTER * max(map(len, shown)) + 0.08) / (CELL * len(trace.emotions))
            axes.text(
                beside,
                i,
                who,
                transform=axes.get_yaxis_transform(),
                fontsize=7,
                weight="bold",
                ha="right",
                va="center",
            )
    return image
