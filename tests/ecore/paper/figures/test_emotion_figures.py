"""Figures 4 and 2: emotions that come together, in the data and in the model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="figures need the extra `figures`")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

from ecore.data.corpus import Conversation  # noqa: E402
from ecore.errors import InputError  # noqa: E402
from ecore.model import ECore  # noqa: E402
from ecore.paper.annotation.lexicon import secondary_emotions  # noqa: E402
from ecore.paper.figures import (  # noqa: E402
    Correlations,
    cooccurrence,
    draw_correlations,
    draw_secondary,
    learned_correlation,
    mentions,
    secondary_shares,
)
from ecore.paper.figures.correlation import circle_order, edges, groups, normalized, rank_correlation  # noqa: E402
from tests.ecore.paper.figures.runs import EMOTIONS, FEW  # noqa: E402


def test_cooccurrence_counts_dialogues() -> None:
    counted = cooccurrence(
        [["sad", "angry", "sad"], ["angry", "sad"], ["sad"], ["angry", "proud"]], ["angry", "proud", "sad"]
    )
    np.testing.assert_array_equal(counted, [[0, 1, 2], [1, 0, 0], [2, 0, 0]])


def test_learned_correlation_is_r_off_the_diagonal(model: ECore) -> None:
    factor = model.perceiver.correlation.factor.detach().numpy()
    inner = factor.T @ factor
    np.fill_diagonal(inner, 0)
    np.testing.assert_allclose(learned_correlation(model), inner, rtol=1e-4, atol=1e-5)


def test_edges_are_those_over_three_tenths_of_the_largest() -> None:
    weights = np.array([[9.0, 2, 0.6, -2], [2, 9, 0.61, 0], [0.6, 0.61, 9, 1], [-2, 0, 1, 9]])
    assert normalized(weights)[0, 1] == 1  # the diagonal is left out
    assert edges(weights) == {(0, 1): 1.0, (1, 2): pytest.approx(0.305), (2, 3): 0.5}
    assert edges(-np.ones((3, 3))) == {}


def test_groups_and_places() -> None:
    weights = np.zeros((7, 7))
    for group in ((0, 2, 4), (1, 5)):
        for i in group:
            for j in group:
                weights[i, j] = 5
    weights[4, 5] = weights[5, 4] = 0.5
    grouped = groups(weights)
    assert grouped == [[0, 2, 4], [1, 5], [3], [6]]
    order = circle_order(weights, grouped)
    assert [set(order[:3]), set(order[3:5]), *order[5:]] == [{0, 2, 4}, {1, 5}, 3, 6]
    chain = np.diag(np.ones(5), 1)
    shuffled = np.array([3, 0, 5, 2, 4, 1])
    chain = (chain + chain.T)[np.ix_(shuffled, shuffled)]
    places = shuffled[circle_order(chain, [list(range(6))])].tolist()
    assert places in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])  # what is linked stands side by side
    assert groups(np.zeros((3, 3))) == [[0], [1], [2]]


def test_rank_correlation_is_spearmans() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    a, b = random.integers(0, 4, (2, 8, 8)).astype(float)  # many ties
    pairs = np.triu_indices(8, 1)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a[pairs], b[pairs]).statistic)
    assert rank_correlation(a, np.ones((8, 8))) is None
    assert rank_correlation(np.ones((1, 1)), np.ones((1, 1))) is None


def test_agreement_of_the_two_graphs() -> None:
    a, b = np.zeros((2, 4, 4))
    a[0, 1] = a[1, 0] = a[2, 3] = a[3, 2] = b[0, 1] = b[1, 0] = 1
    agreement = Correlations(tuple("abcd"), a, b, 3).agreement()
    assert agreement == {
        "shared_edges": 1,
        "expected_shared": 2 / 6,
        "rank_correlation": pytest.approx(0.632, abs=1e-3),
    }
    assert Correlations(tuple("abcd"), a).agreement() is None


def test_figure_4_puts_every_emotion_in_one_place_and_colour() -> None:
    random = np.random.default_rng(3)
    model, data = (np.abs(m + m.T) for m in random.normal(size=(2, len(EMOTIONS), len(EMOTIONS))) ** 3)
    correlations = Correlations(EMOTIONS, model, data, 100)
    figure = draw_correlations(correlations)
    panels = figure.axes
    nodes = [
        {
            t.get_text(): (line.get_marker(), line.get_color(), *line.get_xydata()[0])
            for line, t in zip(p.lines, p.texts, strict=True)
        }
        for p in panels
    ]
    assert nodes[0] == nodes[1]
    assert set(nodes[0]) == set(EMOTIONS)
    place = {tuple(np.round(node[2:], 6)): name for name, node in nodes[0].items()}
    shared = edges(model).keys() & edges(data).keys()
    for panel, weights in zip(panels, (data, model), strict=True):
        drawn = {}
        for patch in panel.patches:
            ends = patch.get_path().vertices[[0, -1]]
            pair = tuple(sorted(EMOTIONS.index(place[tuple(np.round(end, 6))]) for end in ends))
            drawn[pair] = patch
        expected = edges(weights)
        assert drawn.keys() == expected.keys()
        by_weight = sorted(expected, key=expected.get)
        widths = [drawn[pair].get_linewidth() for pair in by_weight]
        assert widths == sorted(widths)
        assert widths[-1] > 2 * widths[0]
        assert {pair for pair in drawn if drawn[pair].get_linestyle() in ("solid", "-")} == shared
    assert f"{len(shared)} edges in both" in figure.texts[0].get_text()
    # Around the circle a label has more room than its line is high.
    spots = sorted((np.arctan2(y, x), x, y) for _, _, x, y in nodes[0].values())
    gap = min(np.hypot(a[1] - b[1], a[2] - b[2]) for a, b in pairwise(spots))
    FigureCanvasAgg(figure).draw()  # equal aspect is settled while drawing
    unit = np.diff(panels[0].transData.transform([(0, 0), (1, 0)])[:, 0])[0]
    assert gap * unit > 9 * figure.dpi / 72


def test_figure_4_without_data_shows_the_model_alone(model: ECore) -> None:
    figure = draw_correlations(Correlations(FEW, learned_correlation(model)))
    assert len(figure.axes) == 1
    assert "in both" not in figure.texts[0].get_text()


SAID = [
    ("sad", "I am sad and sorry."),
    ("sad", "I am so angry and mad."),
    ("sad", "She was jealous, proud and furious."),
    ("angry", "Nothing."),
    ("angry", "I was surprised, anxious, guilty, lonely and grateful. And hopeful."),
]


def test_secondary_emotions_by_label() -> None:
    talks = [Conversation(str(i), emotion, "I envy him.", (text,)) for i, (emotion, text) in enumerate(SAID)]
    shares = secondary_shares(mentions(talks, progress=False))
    assert shares.by_emotion == {"angry": (1, 0, 0, 0, 0, 0, 1), "sad": (1, 1, 0, 1, 0, 0, 0)}
    assert shares.by_number == secondary_emotions(talks).by_number
    assert shares.share == pytest.approx(60)
    assert list(shares.shares().items()) == [("sad", pytest.approx(200 / 3)), ("angry", 50.0)]

    left, right = draw_secondary(shares).axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx([40, 20, 0, 20, 0, 20])
    stacks = np.array([[bar.get_width() for bar in kind] for kind in right.containers])
    np.testing.assert_allclose(stacks, [[100 / 3, 0], [0, 0], [100 / 3, 50]])
    starts = np.array([[bar.get_x() for bar in kind] for kind in right.containers])
    np.testing.assert_allclose(starts, np.vstack([np.zeros(2), np.cumsum(stacks, 0)[:-1]]))
    assert [label.get_text() for label in right.get_yticklabels()] == ["sad", "angry"]
    assert [text.get_text() for text in right.texts] == ["66.7", "50.0"]
    with pytest.raises(InputError, match="at least one dialogue"):
        secondary_shares([])
