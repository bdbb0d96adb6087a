"""The C++ kernels on CPU: against the reference, at sizes that cross their tiles, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ecore_kernels import (
    EdgeUpdate,
    EmotionGraph,
    edge_attention,
    edge_readout,
    explain,
    graph_attention,
    native,
)
from tests.kernels.native_problems import SIZES, attend, flat, leaves_of, problem

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled extension is missing")


@pytest.fixture
def uninitialized_is_nan():
    """Memory that an operator allocates holds NaN, so that what it forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Against the reference --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("receivers", ["all", "words"])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_graph_attention(make, assert_same, size, layers, receivers):
    options = {"masked": layers != 1, "correlation": "batched" if layers else "shared"}
    inputs = problem(make, size, layers, gated=layers != 3, **options)
    actual, expected = (attend(*inputs, receivers=receivers, backend=b) for b in ("native", "reference"))
    assert_same([actual], [expected], leaves_of(*inputs), 1e-11)


@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("per_word", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_edge_readout(make, assert_same, size, layers, per_word):
    graph, history, *_ = problem(make, size, layers, gated=layers != 3, masked=layers != 1)
    scale = size[3] ** -0.5
    actual, expected = (
        edge_readout(graph, history, scale=scale, per_word=per_word, backend=b)
        for b in ("native", "reference")
    )
    assert_same(actual, expected, [*flat(history), graph.emotion_weight, graph.correlation], 1e-11)


@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "nodes, dim, value_dim",
    [(1, 1, 1), (7, 3, 9), (64, 100, 100), (321, 7, 4), (330, 4, 4), (600, 2, 3), (200, 12, 8)],
)
@pytest.mark.parametrize("edge_lead", [(2, 2), (2, 1), (1, 2), (1, 1)])
def test_edge_attention(assert_same, nodes, dim, value_dim, edge_lead, gated):
    query, key, value, gate = (
        torch.randn(2, 2, nodes, *last, dtype=torch.float64, requires_grad=True)
        for last in ((dim,), (dim,), (value_dim,), ())
    )
    edge = torch.randn(*edge_lead, nodes, nodes, dtype=torch.float64, requires_grad=True)
    neighbors = torch.rand(1, 2, nodes, nodes) > 0.6
    neighbors[..., 0, :] = False  # hears nobody
    neighbors[..., -1, :-1] = False  # hears nobody before the last tile
    scale = torch.tensor(0.7, dtype=torch.float64)
    options = {"gate": gate, "edge_scale": scale} if gated else {}
    actual, expected = (
        edge_attention(query, key, value, edge, neighbors, scale=dim**-0.5, backend=b, **options)
        for b in ("native", "reference")
    )
    leaves = [query, key, value, edge, *([gate] if gated else [])]
    count = 2 if gated else 1
    assert_same(actual[:count], expected[:count], leaves, 1e-11)


@pytest.mark.parametrize("edge_lead", [(1, 1), (1, 3), (9, 1)])
def test_an_edge_shared_by_many_adds_up(assert_same, edge_lead):
    """More of them than there are tasks."""
    query, key, value = (torch.randn(9, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    edge = torch.randn(*edge_lead, 5, 5, dtype=torch.float64, requires_grad=True)
    outputs = [edge_attention(query, key, value, edge, backend=b)[:1] for b in ("native", "reference")]
    assert_same(*outputs, [query, key, value, edge])


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_gradcheck(make, operator):
    graph, history, update, value = problem(make, (1, 3, 3, 2, 2), 2, masked=True)
    edge, neighbors = (x.detach() for x in graph.dense())
    edge.requires_grad_()

    def attention(query, key, value, *_):
        return graph_attention(query, key, value, graph, history, backend="native")

    def readout(*_):
        return edge_readout(graph, history, backend="native")

    def dense(query, key, value, *_):
        return edge_attention(
            query,
            key,
            value,
            edge,
            neighbors,
            gate=update.gate,
            edge_scale=update.edge_scale,
            backend="native",
        )

    inputs = [*leaves_of(graph, [*history, update], update, value), edge]  # perturbed in place
    assert gradcheck({"attention": attention, "readout": readout, "dense": dense}[operator], inputs)


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_float32_is_as_exact_as_the_reference(make, operator):
    """Errors of outputs and gradients against float64, at the paper's head size.

    Gradients get a little more: it is a single draw, and these scores reach 100. ``test_saturated.py`` takes medians.
    """

    def run(dtype, backend):
        torch.manual_seed(3)
        graph, history, update, value = problem(make, (2, 64, 32, 100, 100), 1, masked=False)
        inputs = [*flat(history), *leaves_of(graph, [], update, value)]
        cast = {id(x): x.detach().to(dtype).requires_grad_() for x in inputs}

        def to(x):
            return cast[id(x)]

        graph = EmotionGraph(
            graph.word_weight.to(dtype), graph.word_mask, to(graph.emotion_weight), to(graph.correlation)
        )
        history = [EdgeUpdate(*map(to, update)) for update in history]
        if operator == "attention":
            outputs = [
                attend(
                    graph, history, EdgeUpdate(to(update.query), to(update.key)), to(value), backend=backend
                )
            ]
        elif operator == "readout":
            outputs = edge_readout(graph, history, scale=0.1, backend=backend)
        else:
            outputs = edge_attention(
                to(update.query), to(update.key), to(value), *graph.dense(), gate=history[0].gate,
                edge_scale=history[0].edge_scale, scale=0.1, backend=backend,
            )  # fmt: skip
        weights = [torch.randn_like(x, dtype=torch.float64).to(dtype) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [to(x) for x in inputs], weights, allow_unused=True)]

    exact = run(torch.float64, "reference")
    results = zip(exact, run(torch.float32, "native"), run(torch.float32, "reference"), strict=True)
    for index, (truth, one, other) in enumerate(results):
        if truth is None:
            continue
        errors = [float((x.double() - truth).detach().abs().max()) for x in (one, other)]
        bound = 2 if index == 0 else 5
        assert errors[0] <= bound * errors[1] + 1e-6 * float(truth.detach().abs().max())


def test_vanishing_and_huge_scores(make):
    """Weights that underflow are exactly 0, and the largest score never overflows."""
    graph, history, update, value = problem(make, (2, 9, 4, 3, 3), 1, dtype=torch.float32)
    for factor in (1e-20, 1e3, 1e6):
        wide = EdgeUpdate(update.query * factor, update.key * factor)
        outputs = [attend(graph, history, wide, value, backend=b) for b in ("native", "reference")]
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


# Properties -------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2), st.integers(0, 2**31))
def test_padding_changes_no_bit(words, emotions, layers, seed):
    """Words beyond the last one and a batch beside it: the same bits for what was there before."""
    torch.manual_seed(seed)
    lead, more = (2, 2), 7
    nodes = [torch.randn(*lead, words + emotions, 5) for _ in range(3 + 2 * layers)]
    mask, correlation = torch.rand(*lead, words) > 0.3, torch.rand(emotions, emotions)
    word_weight, emotion_weight = torch.rand(2, words), torch.rand(2, emotions)

    def run(nodes, mask, word_weight, emotion_weight):
        graph = EmotionGraph(word_weight, mask, emotion_weight, correlation)
        history = [EdgeUpdate(*nodes[3 + 2 * layer : 5 + 2 * layer]) for layer in range(layers)]
        return graph_attention(*nodes[:3], graph, history, backend="native")

    def padded(x):
        return torch.cat(
            [x[:, :, :words], torch.randn(*x.shape[:2], more, x.shape[3]), x[:, :, words:]], dim=2
        )

    small = run(nodes, mask, word_weight, emotion_weight)
    big = run(
        [torch.cat([padded(x), padded(x)]) for x in nodes],
        torch.cat([mask, torch.zeros(*lead, more, dtype=torch.bool)], dim=2).repeat(2, 1, 1),
        torch.cat([word_weight, torch.rand(2, more)], dim=1).repeat(2, 1),
        emotion_weight.repeat(2, 1),
    )
    assert torch.equal(big[2:, :, :words], small[:, :, :words])
    assert torch.equal(big[2:, :, words + more :], small[:, :, words:])
    assert not big[:, :, words : words + more].any()


@pytest.mark.parametrize("receivers", ["all", "words"])
@pytest.mark.parametrize("size", [(2, 9, 6, 5, 7), (1, 330, 9, 4, 8)], ids=str)
def test_each_gradient_alone(make, size, receivers):
    """The same bits whoever else asks; what nobody asks for is not computed, so that it may be anything."""
    graph, history, update, value = problem(make, size, 1, dtype=torch.float32)
    leaves = leaves_of(graph, history, update, value)

    def gradients(asked):
        for x in leaves:
            x.requires_grad_(any(x is other for other in asked))
        output = attend(graph, history, update, value, receivers=receivers, backend="native")
        return torch.autograd.grad(output, asked, torch.ones_like(output))

    leaves = [x for x in leaves if x is not update.gate and x is not update.edge_scale]
    together = gradients(leaves)
    for leaf, expected in zip(leaves, together, strict=True):
        (alone,) = gradients([leaf])
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("edge_lead", [(2, 2), (1, 1)])
@pytest.mark.parametrize("nodes", [9, 330])
def test_each_gradient_of_a_dense_graph_alone(nodes, edge_lead):
    leaves = [torch.randn(2, 2, nodes, *last) for last in ((5,), (5,), (7,), ())]
    leaves.append(torch.randn(*edge_lead, nodes, nodes))
    neighbors = torch.rand(1, 2, nodes, nodes) > 0.5

    def gradients(asked):
        for x in leaves:
            x.requires_grad_(any(x is other for other in asked))
        query, key, value, gate, edge = leaves
        outputs = edge_attention(
            query, key, value, edge, neighbors, gate=gate, edge_scale=torch.ones(()), backend="native"
        )
        return torch.autograd.grad(sum(x.sum() for x in outputs), asked)

    together = gradients(leaves)
    for leaf, expected in zip(leaves, together, strict=True):
        (alone,) = gradients([leaf])
        assert torch.equal(alone, expected)


def test_refusals(make):
    graph, history, update, value = problem(make, (1, 3, 2, 2, 2), 1, dtype=torch.float32)

    def refused(message, graph=graph, history=history, update=update, value=value):
        with pytest.raises(RuntimeError, match=message):
            attend(graph, history, update, value, backend="native")

    low = torch.float8_e4m3fn
    refused("takes float16, bfloat16, float32, float64, not float8_e4m3fn", value=value.to(low))
    weighted = EmotionGraph(
        graph.word_weight.requires_grad_(), graph.word_mask, graph.emotion_weight, graph.correlation
    )
    refused("gives no gradient to word_weight", graph=weighted)
    with torch.no_grad():
        attend(weighted, history, update, value, backend="native")
    assert explain(graph_attention, update.query, update.key, value, weighted, history).startswith(
        "graph_attention: reference"
    )
    elsewhere = [x.to("meta") for x in (update.query, update.key, value)]
    assert "native: runs on CPU, not on meta" in explain(edge_attention, *elsewhere, torch.ones(()))
    nodes = [x.to(low) for x in (update.query, update.key)]
    with pytest.raises(RuntimeError, match=r"takes float16, .*, not float8_e4m3fn"):
        edge_readout(graph, [EdgeUpdate(*nodes)], backend="native")
