"""The dialogue's edges are those of the paper's recurrence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib", reason="figures need the extra `figures`")

from ecore.data.batches import MAX_CONTEXT_WORDS, context_batch  # noqa: E402
from ecore.errors import InputError  # noqa: E402
from ecore.model import ECore  # noqa: E402
from ecore.model.transformer import SublayerEnds  # noqa: E402
from ecore.paper.figures import (  # noqa: E402
    NotDrawn,
    trace,
)
from ecore_kernels import EmotionGraph, edge_attention  # noqa: E402
from tests.ecore.paper.figures.runs import FEW, TURNS, new_model  # noqa: E402


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
            end = SublayerEnds(0, layer.dropout, nodes)
            nodes = layer.finish(nodes, out.transpose(1, 2).flatten(2), end)
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
