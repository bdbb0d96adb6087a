"""The figures: what they draw is what the model, the data and the log say; nothing is cut off; files do not change."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib", reason="figures need the extra `figures`")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402

from ecore.cli.figures import declare_figures, run_figures  # noqa: E402
from ecore.config import ModelConfig  # noqa: E402
from ecore.data.batches import MAX_CONTEXT_WORDS, context_batch  # noqa: E402
from ecore.data.corpus import Conversation  # noqa: E402
from ecore.data.prepare import prepare  # noqa: E402
from ecore.data.prepared import PreparedData  # noqa: E402
from ecore.errors import InputError  # noqa: E402
from ecore.model import ECore, pretrained  # noqa: E402
from ecore.paper.annotation.lexicon import TABLE_12, secondary_emotions  # noqa: E402
from ecore.paper.figures import (  # noqa: E402
    Correlations,
    NotDrawn,
    Trace,
    cooccurrence,
    draw_aggregation,
    draw_correlations,
    draw_run,
    draw_secondary,
    draw_training,
    draw_word_edges,
    learned_correlation,
    mentions,
    secondary_shares,
    trace,
    training_curves,
)
from ecore.paper.figures.correlation import circle_order, edges, groups, normalized, rank_correlation  # noqa: E402
from ecore.paper.figures.word_edges import LONGEST_WORD, WORDS_A_BLOCK, blocks  # noqa: E402
from ecore_kernels import EmotionGraph, edge_attention  # noqa: E402

EMOTIONS = tuple(TABLE_12)
FEW = EMOTIONS[:8]
CONFIG = ModelConfig(dim=24, encoder_blocks=1, decoder_blocks=1, heads=2, feed_forward=16)
TURNS = ["I was terrified, a car hit me for $5 !", "Are you sad?", "I am glad to be alive."]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations that say each emotion's own word, some of them another's too."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "corpus").mkdir()
    for split in ("train", "valid", "test"):
        lines = []
        for i, emotion in enumerate(FEW):
            other = FEW[(i + 1) % len(FEW)] if i % 3 else emotion
            said = [f"I feel {emotion} about the car.", "Tell me more.", f"They were {other}.", "I see."]
            turns = [{"speaker": ("speaker", "listener")[t % 2], "text": text} for t, text in enumerate(said)]
            record = {"conv_id": f"{split}{i}", "emotion": emotion, "situation": "x", "utterances": turns}
            lines.append(json.dumps(record) + "\n")
        (folder / "corpus" / f"{split}.jsonl").write_text("".join(lines))
    prepare(folder / "corpus", folder / "prepared", progress=False)
    return folder / "prepared"


def new_model(prepared: Path, **settings: object) -> ECore:
    torch.manual_seed(0)
    data = PreparedData.load(prepared)
    model = ECore(ModelConfig(**{**vars(CONFIG), **settings}), data.vocabulary, data.tables).eval()
    with torch.no_grad():  # gates and correlations as large as a trained model's
        if model.perceiver is not None:
            for layer in getattr(model.perceiver.graph_network, "layers", ()):
                layer.attention.gate.weight.mul_(20)
            model.perceiver.correlation.factor.mul_(2)
    return model


@pytest.fixture(scope="module")
def model(prepared: Path) -> ECore:
    return new_model(prepared, graph_layers=3)


def save_run(model: ECore, folder: Path, prepared: Path) -> Path:
    pretrained.save(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["data"]["folder"] = str(prepared)
    (folder / "config.json").write_text(json.dumps(config))
    log = [
        {"step": s, "loss": 90.0 - s, "nll_per_token": 5.0 - s / 10, "emotion_accuracy": 3.0 * s}
        for s in (1, 5, 9)
    ]
    log[2] |= {"valid_ppl": 60.0, "valid_ppl_per_sample": 50.0, "valid_emotion_accuracy": 30.0}
    log[1]["loss"] = None  # not finite
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in log) + '{"step": 13, "lo'
    )
    return folder


@pytest.fixture(scope="module")
def run(prepared: Path, model: ECore) -> Path:
    return save_run(model, prepared.parent / "run", prepared)


def extents(texts):
    """Boxes in pixels; the figure has been drawn, for only then do ticks stand where they belong."""
    return [text.get_window_extent() for text in texts]


# The dialogue's edges ---------------------------------------------------------------------------------------------


def test_trace_has_the_edges_of_the_papers_recurrence(model: ECore) -> None:
    """Layer by layer on the dense graph, as Eqs. 4 to 7 say it."""
    seen = trace(model, TURNS, "sad")
    batch = context_batch([TURNS], model.vocabulary, model.tables)
    with torch.no_grad():
        correlation = model.perceiver.correlation().softmax(-1)
        graph = EmotionGraph.from_intensity(
            model.intensity[batch.context], batch.lengths, model.config.thresholds, correlation
        )
        edge, neighbors = graph.dense()
        words = model.embedding(batch.context, batch.state)
        emotions = model.embedding.word(model.emotion_words)[None] * model.config.dim**0.5
        nodes = torch.cat(
            [
                model.perceiver.graph_network.word_norm(words),
                model.perceiver.graph_network.emotion_norm(emotions),
            ],
            1,
        )
        for layer in model.perceiver.graph_network.layers:
            update = layer.attention.edge_update(nodes)
            out, edge = edge_attention(
                update.query, update.key, layer.attention.values(nodes), edge, neighbors,
                gate=update.gate, edge_scale=update.edge_scale, scale=layer.attention.scale,
            )  # fmt: skip
            nodes = layer.finish(nodes, out.transpose(1, 2).flatten(2))
        count = batch.context.shape[1]
        total = edge.sum(1)[0].numpy()
        encoding = model.encode(batch)
    assert not seen.word_edges[0].any()  # [CLS] is not summed
    np.testing.assert_allclose(seen.word_edges[1:], total[1:count, count:], rtol=1e-3, atol=1e-5)
    own = np.eye(len(FEW), dtype=bool)
    others = np.where(own, 0.0, total[count:, count:])
    among = own + others / np.maximum(1.0, np.abs(others).sum(1, keepdims=True))
    np.testing.assert_allclose(seen.emotion_edges, among, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(seen.before, seen.word_edges.sum(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen.after, seen.emotion_edges @ seen.before, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen.perceived, encoding.perceived.main_logits[0].softmax(-1), rtol=1e-4)
    assert np.abs(seen.word_edges).max() > 0.01  # not all alike by being nothing


def test_what_would_be_perceived_without_aggregation(model: ECore) -> None:
    seen = trace(model, TURNS)
    parts = model.perceiver.perceptron
    with torch.no_grad():
        batch = context_batch([TURNS], model.vocabulary, model.tables)
        mean = model.encode(batch).memory[0, : batch.context.shape[1]].mean(0)

        def perceived(signal: np.ndarray) -> np.ndarray:
            joined = torch.cat([parts.norm(torch.from_numpy(signal)), parts.context(mean)])
            return parts.main(joined).softmax(-1).numpy()

        np.testing.assert_allclose(seen.perceived_before, perceived(seen.before), rtol=1e-4)
        np.testing.assert_allclose(seen.perceived, perceived(seen.after), rtol=1e-4)
    assert np.abs(seen.perceived_before - seen.perceived).max() > 1e-4


def test_trace_names_words_and_turns(model: ECore) -> None:
    seen = trace(model, ["Zyzzyva $ok!", "Why?"], "sad")  # words that no vocabulary has are shown as they are
    assert seen.words == ("[CLS]", "zyzzyva", "$", "ok", "!", "why", "?")
    assert seen.turns == (-1, 0, 0, 0, 0, 1, 1)
    assert seen.emotion == "sad"
    long = trace(model, ["first " * 8, "word " * MAX_CONTEXT_WORDS])
    assert long.words == ("[CLS]", *["word"] * MAX_CONTEXT_WORDS)
    assert len(long.words) == len(long.word_edges)
    for turns in ([], ["Hello.", "  "]):
        with pytest.raises(InputError, match="dialogue"):
            trace(model, turns)


def test_no_graph_no_trace(prepared: Path) -> None:
    with pytest.raises(NotDrawn, match="no emotion graph"):
        trace(new_model(prepared, ablations=("graph",)), TURNS)


def test_without_aggregation_before_is_after(prepared: Path) -> None:
    seen = trace(new_model(prepared, ablations=("co-p",)), TURNS)
    np.testing.assert_allclose(seen.after, seen.before, rtol=1e-5)


# Figure 5 ---------------------------------------------------------------------------------------------------------


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


# Figure 6 ---------------------------------------------------------------------------------------------------------


def test_figure_6_has_one_row_an_emotion_through_all_panels() -> None:
    seen = made_up_trace(30)
    figure = draw_aggregation(seen)
    first, middle, second, told = figure.axes[:4]
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
    without, with_it = (line.get_xdata() for line in told.lines)
    np.testing.assert_allclose(without, 100 * seen.perceived_before[order])
    np.testing.assert_allclose(with_it, 100 * seen.perceived[order])
    assert all(axes.yaxis_inverted() for axes in figure.axes[:4])
    assert "true: guilty" in figure.texts[0].get_text()


# Figure 4 ---------------------------------------------------------------------------------------------------------


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
    told = Correlations(tuple("abcd"), a, b, 3).agreement()
    assert told == {
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


# Figure 2 ---------------------------------------------------------------------------------------------------------

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


# Training ---------------------------------------------------------------------------------------------------------


def test_training_curves_are_the_logs(run: Path, tmp_path: Path) -> None:
    curves = training_curves(run)
    assert curves.loss == [(1, 89.0), (9, 81.0)]  # null left out, the torn line too
    assert curves.train_ppl == [(s, pytest.approx(np.exp(5 - s / 10))) for s in (1, 5, 9)]
    assert curves.valid_ppl == [(9, 60.0)]
    assert curves.valid_ppl_per_sample == [(9, 50.0)]
    assert curves.train_accuracy == [(1, 3.0), (5, 15.0), (9, 27.0)]
    assert curves.valid_accuracy == [(9, 30.0)]
    loss, ppl, accuracy = draw_training(curves, "run").axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), curves.loss)
    assert ppl.get_yscale() == "log"
    for axes, expected in (
        (ppl, (curves.train_ppl, curves.valid_ppl, curves.valid_ppl_per_sample)),
        (accuracy, (curves.train_accuracy, curves.valid_accuracy)),
    ):
        for line, points in zip(axes.lines, expected, strict=True):
            np.testing.assert_allclose(line.get_xydata(), points)
    assert [text.get_text() for text in ppl.get_legend().get_texts()][1:] == [
        "validation, per token: 60.0",
        "validation, per sample: 50.0",
    ]
    with pytest.raises(NotDrawn, match="nothing logged"):
        training_curves(tmp_path)


# All of a run -----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    declare_figures(parser)
    return run_figures(parser.parse_args([str(a) for a in arguments]))


def test_every_figure_of_a_run_the_same_bytes_every_time(
    run: Path, prepared: Path, model: ECore, tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams)
    written = draw_run(run, tmp_path / "a", progress=False)
    with matplotlib.rc_context(
        {"font.size": 31, "pdf.compression": 0, "axes.grid": True}
    ):  # a user's matplotlibrc
        draw_run(run, tmp_path / "b", progress=False)
    assert dict(matplotlib.rcParams) == before
    names = {
        f"{name}.{kind}"
        for name in ("training", "figure2", "figure4", "figure5", "figure6")
        for kind in ("pdf", "png", "json")
    }
    assert {path.name for path in written} == names == {path.name for path in (tmp_path / "b").iterdir()}
    for path in written:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert b"CreationDate" not in (tmp_path / "a" / "figure5.pdf").read_bytes()

    told = {path.stem: json.loads(path.read_text()) for path in written if path.suffix == ".json"}
    talk = PreparedData.load(prepared).test.texts(0)
    seen = trace(model, talk["context"], talk["emotion"])
    assert told["figure5"]["words"] == list(seen.words)
    np.testing.assert_allclose(told["figure5"]["word_edges"], seen.word_edges)
    assert told["figure6"]["emotion"] == talk["emotion"]
    assert told["figure4"]["dialogues"] == 3 * len(FEW) == told["figure2"]["dialogues"]
    found = [
        m.found | {m.emotion} for m in mentions(PreparedData.load(prepared).conversations(), progress=False)
    ]
    counted = cooccurrence(found, model.vocabulary.emotions)
    assert told["figure4"]["data"]["weights"] == counted.tolist()
    assert counted.max() >= 3
    assert told["training"]["loss"] == [[1, 89.0], [9, 81.0]]


def test_only_what_was_asked_for_and_a_dialogue_of_ones_own(
    run: Path, prepared: Path, tmp_path: Path
) -> None:
    assert command(run, "--out", tmp_path, "--only", "5", "--text", "I am afraid.", "--text", "Why?") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"figure5.pdf", "figure5.png", "figure5.json"}
    told = json.loads((tmp_path / "figure5.json").read_text())
    assert told["words"] == ["[CLS]", "i", "am", "afraid", ".", "why", "?"]
    assert told["emotion"] is None
    assert command(run, "--out", tmp_path, "--only", "6", "--split", "valid", "--sample", "5") == 0
    record = json.loads((tmp_path / "figure6.json").read_text())
    assert record["emotion"] == PreparedData.load(prepared).valid.texts(5)["emotion"]


def test_without_its_data_the_rest_is_drawn(model: ECore, tmp_path: Path, capsys) -> None:
    run = save_run(model, tmp_path / "run", tmp_path / "gone")
    draw_run(run, tmp_path / "out", progress=False)
    out = capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"training", "figure4"}
    assert "figure 2: not drawn" in out
    assert "figures 5 and 6: not drawn" in out
    assert "only the model's half" in out
    draw_run(run, tmp_path / "own", text=["I am sad."], progress=False)
    assert {path.stem for path in (tmp_path / "own").iterdir()} == {
        "training",
        "figure4",
        "figure5",
        "figure6",
    }


def test_a_run_without_graph_has_its_other_figures(prepared: Path, tmp_path: Path, capsys) -> None:
    run = save_run(new_model(prepared, ablations=("graph",)), tmp_path / "run", prepared)
    draw_run(run, tmp_path / "out", progress=False)
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"training", "figure2", "figure4"}
    assert "no emotion graph (--ablate graph or" in capsys.readouterr().out


def test_refusals(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, told in (
        (("--sample", 99), "sample: expected 0 to 15 of the test split, got 99"),
        (("--sample", -1), "got -1"),
        (("--text", "Hi.", "--sample", 0), "either --text or --sample"),
        (("--text", " "), "dialogue: expected"),
        (("--data", tmp_path / "none"), "no such folder"),
    ):
        with pytest.raises(InputError, match=told):
            command(run, "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="expected one that `ecore train` wrote"):
        command(tmp_path / "none", "--out", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        command(run, "--out", tmp_path / "file", "--only", "training")
    with pytest.raises(InputError, match="figure: expected one of"):
        draw_run(run, tmp_path / "out", only=["3"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'ecore\[figures\]'"):
        command(run, "--out", tmp_path / "out")


def test_pyplot_is_never_imported(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from ecore.paper.figures import draw_run; "
        f"draw_run({str(run)!r}, {str(tmp_path)!r}, only=['training', '5', '6'], text=['I am sad.']); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plain_transformer_has_what_needs_no_emotions(prepared: Path, tmp_path: Path, capsys) -> None:
    run = save_run(new_model(prepared, strategy="none"), tmp_path / "run", prepared)
    draw_run(run, tmp_path / "out", progress=False)
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"training", "figure2"}
    assert "learned no emotion correlation" in capsys.readouterr().out
