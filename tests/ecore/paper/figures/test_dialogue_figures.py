"""Figures 5 and 6: every word, weight and emotion is drawn, and nothing is cut off."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="figures need the extra `figures`")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402

from ecore.paper.figures import (  # noqa: E402
    Trace,
    draw_aggregation,
    draw_word_edges,
)
from ecore.paper.figures.word_edges import LONGEST_WORD, WORDS_A_BLOCK, blocks  # noqa: E402
from tests.ecore.paper.figures.runs import EMOTIONS, extents  # noqa: E402


@pytest.mark.parametrize("words", [1, 2, 40, 48, 49, 96, 97, 513])
def test_blocks_cover_every_word_once_and_evenly(words: int) -> None:
    cut = blocks(words)
    assert [i for part in cut for i in range(words)[part]] == list(range(words))
    sizes = [part.stop - part.start for part in cut]
    assert max(sizes) <= WORDS_A_BLOCK
    assert max(sizes) - min(sizes) <= 1


def made_up_trace(words: int) -> Trace:
    random = np.random.default_rng(0)
    size = len(EMOTIONS)
    names = ("[CLS]", *(f"{'embarrassing' * (i % 3 == 0)}word{i}" for i in range(words - 1)))
    turns = (-1, *sorted(i % 3 for i in range(words - 1)))
    weights = random.normal(size=(words, size)).astype(np.float32) ** 3
    among = random.normal(size=(size, size)).astype(np.float32)
    np.fill_diagonal(among, 1)
    before, after = weights.sum(0), among @ weights.sum(0)
    share = [random.dirichlet(np.ones(size)).astype(np.float32) for _ in range(2)]
    return Trace(names, turns, EMOTIONS, weights, among, before, after, *share, "guilty")


@pytest.mark.parametrize("words", [2, 3, 41, 120])
def test_figure_5_shows_every_word_and_weight(words: int) -> None:
    seen = made_up_trace(words)
    figure = draw_word_edges(seen)
    *maps, bar = figure.axes
    np.testing.assert_array_equal(
        np.concatenate([axes.collections[0].get_array() for axes in maps]), seen.word_edges
    )
    labels = [label for axes in maps for label in axes.get_yticklabels()]
    cut = [w if len(w) <= LONGEST_WORD else w[: LONGEST_WORD - 1] + "…" for w in seen.words]
    assert [label.get_text() for label in labels] == cut
    assert all(axes.yaxis_inverted() for axes in maps)  # the dialogue reads downwards
    most = np.abs(seen.word_edges).max()
    assert maps[0].collections[0].norm.vmax == -maps[0].collections[0].norm.vmin == most
    marked = {
        (int(x), int(y) + part.start)
        for axes, part in zip(maps, blocks(words), strict=True)
        for line in axes.lines
        if line.get_marker() == "_"
        for x, y in zip(*line.get_data(), strict=True)
    }
    assert marked == {(j, i) for i, j in zip(*np.nonzero(seen.word_edges < -0.04 * most), strict=True)}
    bold = {label.get_text() for label in maps[0].get_xticklabels() if label.get_fontweight() == "bold"}
    assert bold == {"guilty"}
    starts = [text.get_text() for text in maps[0].texts]
    assert starts[0] == "S1"

    def apart(boxes: list, first: str, last: str) -> bool:
        boxes = sorted(boxes, key=lambda box: getattr(box, first))
        return all(getattr(a, last) <= getattr(b, first) + 0.5 for a, b in pairwise(boxes))

    FigureCanvasAgg(figure).draw()
    assert apart(extents(bar.get_yticklabels()), "y0", "y1")
    for axes in maps:
        assert apart(extents(axes.get_yticklabels()), "y0", "y1")
        assert apart(extents(axes.get_xticklabels()), "x0", "x1")
        beside, words_of = extents(axes.texts), extents(axes.get_yticklabels())
        assert max(box.x1 for box in beside) < min(box.x0 for box in words_of)
    page = figure.bbox
    for box in extents([*labels, *(t for axes in maps for t in axes.texts), *bar.get_yticklabels()]):
        assert page.x0 - 1 <= box.x0
        assert box.x1 <= page.x1 + 1
    left = {axes.get_position().x0 for axes in maps}
    assert len(left) == min(2, len(maps))


def test_figure_6_has_one_row_an_emotion_through_all_panels() -> None:
    seen = made_up_trace(30)
    figure = draw_aggregation(seen)
    first, middle, second, shift = figure.axes[:4]
    order = np.argsort(-seen.perceived)
    assert [label.get_text() for label in first.get_yticklabels()] == [EMOTIONS[i] for i in order]
    assert [label.get_text() for label in middle.get_xticklabels()] == [EMOTIONS[i] for i in order]
    for axes, values in ((first, seen.before), (second, seen.after)):
        np.testing.assert_allclose(
            [bar.get_width() for bar in axes.patches[: len(order)]], values[order], rtol=1e-6
        )
        dark = [to_hex(bar.get_facecolor()) for bar in axes.patches[: len(order)]]
        assert dark.index("#0072b2") == int(values[order].argmax())
        assert axes.texts[0].get_text().strip() == f"{values.max():.2f}"
    shown = middle.collections[0].get_array()
    own = np.eye(len(order), dtype=bool)
    np.testing.assert_allclose(shown[~own], seen.emotion_edges[np.ix_(order, order)][~own])
    assert np.ma.getmaskarray(shown)[own].all() or np.isnan(shown[own]).all()
    without, with_it = (line.get_xdata() for line in shift.lines)
    np.testing.assert_allclose(without, 100 * seen.perceived_before[order])
    np.testing.assert_allclose(with_it, 100 * seen.perceived[order])
    assert all(axes.yaxis_inverted() for axes in figure.axes[:4])
    assert "true: guilty" in figure.texts[0].get_text()
