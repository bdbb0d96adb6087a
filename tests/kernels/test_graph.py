"""EmotionGraph against its table, spelled out pair by pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from ecore_kernels import EmotionGraph


@pytest.mark.parametrize("words, emotions", [(1, 1), (1, 4), (6, 1), (5, 4)])
@pytest.mark.parametrize("correlation", ["shared", "batched"])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_is_the_table(make, oracle, words, emotions, correlation, masked):
    graph = make.graph(2, words, emotions, correlation=correlation, masked=masked)
    edge, neighbors = graph.dense()
    expected_edge, expected_neighbors = oracle.spell_out(graph)
    assert torch.equal(neighbors, expected_neighbors)
    assert torch.equal(edge, expected_edge)


def test_dense_hand_written():
    """Three words, of which the last is out, and two emotions: every number by hand."""
    graph = EmotionGraph(
        torch.tensor([[9.0, 0.5, 0.7]]),
        torch.tensor([[[False, True, False]]]),
        torch.tensor([[0.1, 0.2]]),
        torch.tensor([[0.3, 0.4], [0.5, 0.6]]),
    )
    edge, neighbors = graph.dense()
    expected = torch.tensor(
        [
            [1.0, 0.5, 0.0, 0.1, 0.2],
            [1.0, 0.5, 0.0, 0.1, 0.2],
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [1.0, 0.0, 0.0, 0.0, 0.4],
            [1.0, 0.0, 0.0, 0.5, 0.0],
        ]
    )
    assert torch.equal(edge[0, 0], expected)
    assert torch.equal(neighbors[0, 0], expected != 0)


@pytest.mark.parametrize("words", [1, 7])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_from_intensity(oracle, words, given, batched):
    batch, emotions, thresholds = 4, 3, (0.0, 0.075, 0.15)
    intensity = torch.rand(batch, words, dtype=torch.float64) * 0.25
    intensity[1] = 0.0  # no intensity at all
    intensity[:, 0] = 5.0  # [CLS]'s is not read
    if words > 2:
        intensity[2, 1] = 0.075  # on the threshold: it takes part
        intensity[3, -1] = 7.0  # padding is not read
    lengths = torch.tensor([words, words, words, max(1, words - 1)])
    correlation = torch.rand(
        (batch, emotions, emotions) if batched else (emotions, emotions), dtype=torch.float64
    )
    emotion_weight = torch.rand(batch, emotions, dtype=torch.float64) if given else None
    emotion_mask = torch.tensor([[True, False, True]] * batch) if given else None

    weight = torch.zeros(batch, words, dtype=torch.float64)
    mask = torch.zeros(batch, len(thresholds), words, dtype=torch.bool)
    for b in range(batch):
        real = range(1, int(lengths[b]))
        peak = max((float(intensity[b, j]) for j in real), default=0.0)
        for j in real:
            weight[b, j] = intensity[b, j] / peak if peak else 0.0
            for k, threshold in enumerate(thresholds):
                mask[b, k, j] = intensity[b, j] >= threshold
    by_hand = EmotionGraph(
        weight,
        mask,
        torch.full((batch, emotions), 1 / emotions, dtype=torch.float64)
        if emotion_weight is None
        else emotion_weight,
        correlation,
        emotion_mask,
    )
    graph = EmotionGraph.from_intensity(
        intensity, lengths, thresholds, correlation, emotion_weight, emotion_mask
    )
    assert graph.shape == (batch, 3, words, emotions)
    for actual, expected in zip(graph.dense(), oracle.spell_out(by_hand), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)


def test_a_screened_out_word_neither_sends_nor_receives():
    graph = EmotionGraph.from_intensity(
        torch.tensor([[0.0, 0.2, 0.1, 0.2]]), torch.tensor([4]), (0.0, 0.15), torch.eye(2)
    )
    _, neighbors = graph.dense()
    assert neighbors[0, 0, 2].any()
    assert not neighbors[0, 1, 2].any()
    assert not neighbors[0, 1, :, 2].any()


def test_thresholds_in_a_tensor():
    given = torch.tensor([[0.3, 0.2, 0.1, 0.9]]), torch.tensor([3])
    listed, held = (
        EmotionGraph.from_intensity(*given, thresholds, torch.eye(2)).word_mask
        for thresholds in ((0.0, 0.15), torch.tensor([0.0, 0.15]))
    )
    assert torch.equal(listed, held)
    assert held.tolist() == [[[True, True, True, False], [True, True, False, False]]]
    with pytest.raises(ValueError, match=r"thresholds: expected \[K\], got \[1, 2\]"):
        EmotionGraph.from_intensity(*given, torch.zeros(1, 2), torch.eye(2))


def test_participants(make):
    graph = make.graph(masked=True)
    expected = torch.cat([graph.word_mask, graph.emotion_mask[:, None].expand(-1, 3, -1)], 2)
    expected[:, :, 0] = True
    assert torch.equal(graph.participants(), expected)


def test_dense_gradients_are_one_per_edge(make):
    graph = replace(make.graph(masked=False), word_mask=torch.ones(2, 3, 5, dtype=torch.bool))
    graph.dense()[0].sum().backward()
    # Every word hears every emotion at three resolutions; nobody hears itself among the emotions.
    assert torch.equal(graph.emotion_weight.grad, torch.full((2, 4), 15.0, dtype=torch.float64))
    assert torch.equal(graph.correlation.grad, 6.0 * (1 - torch.eye(4, dtype=torch.float64)))


FIELDS = {
    "word_weight": torch.zeros(2, 5),
    "word_mask": torch.ones(2, 3, 5, dtype=torch.bool),
    "emotion_weight": torch.zeros(2, 4),
    "correlation": torch.zeros(4, 4),
    "emotion_mask": torch.ones(2, 4, dtype=torch.bool),
}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("word_weight", torch.zeros(2, 6), r"word_weight: expected \[2, 5\], got \[2, 6\]"),
        ("word_weight", torch.zeros(2, 5, dtype=torch.int64), "word_weight: expected a float type"),
        ("word_mask", torch.ones(2, 5, dtype=torch.bool), r"word_mask: expected \[B, K, M\], got \[2, 5\]"),
        ("word_mask", torch.ones(2, 3, 5), "word_mask: expected torch.bool, got torch.float32"),
        ("word_mask", torch.ones(2, 0, 5, dtype=torch.bool), "at least one resolution"),
        ("emotion_weight", torch.zeros(4), r"emotion_weight: expected \[B, P\], got \[4\]"),
        ("emotion_weight", torch.zeros(3, 4), r"emotion_weight: expected \[2, 4\], got \[3, 4\]"),
        ("correlation", torch.zeros(4, 5), r"correlation: expected \[4, 4\], got \[4, 5\]"),
        ("correlation", torch.zeros(1, 4, 4), r"correlation: expected \[2, 4, 4\], got \[1, 4, 4\]"),
        ("emotion_mask", torch.ones(2, 4), "emotion_mask: expected torch.bool"),
        ("emotion_mask", torch.ones(4, dtype=torch.bool), r"emotion_mask: expected \[2, 4\], got \[4\]"),
    ],
)
def test_refuses_what_does_not_fit(name, value, message):
    EmotionGraph(**FIELDS)
    with pytest.raises(ValueError, match=message):
        EmotionGraph(**(FIELDS | {name: value}))


@pytest.mark.parametrize(
    "intensity, lengths, thresholds, message",
    [
        (torch.zeros(5), torch.tensor([5]), (0.0,), "expected intensity"),
        (torch.zeros(2, 5), torch.tensor([5]), (0.0,), "lengths"),
        (torch.zeros(2, 5), torch.tensor([5, 5]), (), "thresholds: expected at least one"),
    ],
)
def test_from_intensity_refuses(intensity, lengths, thresholds, message):
    with pytest.raises(ValueError, match=message):
        EmotionGraph.from_intensity(intensity, lengths, thresholds, torch.eye(3))


def test_to(make):
    graph = make.graph(2, 3, 2, 2)
    for moved in (graph.to("meta"), graph.to(device="meta"), graph.to(torch.ones(1, device="meta"))):
        assert all(x.device.type == "meta" for x in moved.tensors())
    for low in (graph.to(torch.float16), graph.to(dtype=torch.float16), graph.to("cpu", torch.float16)):
        assert [x.dtype for x in low.tensors()] == [
            torch.float16,
            torch.bool,
            torch.float16,
            torch.float16,
            torch.bool,
        ]
    assert all(one is other for one, other in zip(graph.to("cpu").tensors(), graph.tensors(), strict=True))
    (gradient,) = torch.autograd.grad(graph.to(torch.float32).emotion_weight.sum(), graph.emotion_weight)
    assert torch.equal(gradient, torch.ones_like(gradient))
    with pytest.raises(ValueError, match=r"EmotionGraph.to: expected a float type, got torch.int64"):
        graph.to(torch.int64)
    without = EmotionGraph(*graph.tensors()[:4])
    assert without.to("meta").emotion_mask is None


def test_pin_memory(make, monkeypatch):
    """As a DataLoader does it, to every tensor."""
    graph, pinned = make.graph(2, 3, 2, 2), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    copy = graph.pin_memory()
    assert len(pinned) == 5
    assert torch.equal(copy.word_mask, graph.word_mask)


def test_pytree(make):
    graph = make.graph(2, 3, 2, 2)
    leaves, structure = pytree.tree_flatten({"graph": graph})
    assert all(one is other for one, other in zip(leaves, graph.tensors(), strict=True))
    shapes = pytree.tree_map(lambda x: tuple(x.shape), graph)  # no tensors: nothing is checked
    assert isinstance(shapes, EmotionGraph)
    assert shapes.word_mask == (2, 2, 3)
    saved = pytree.treespec_loads(pytree.treespec_dumps(structure))
    assert torch.equal(pytree.tree_unflatten(leaves, saved)["graph"].correlation, graph.correlation)
    places = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(graph)[0]]
    assert places[0] == ".word_weight"
    mapped = torch.vmap(lambda g: g.emotion_weight.sum(), in_dims=(0,))(
        pytree.tree_map(lambda x: x[None], graph)
    )
    torch.testing.assert_close(mapped[0], graph.emotion_weight.sum())
