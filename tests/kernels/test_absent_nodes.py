"""Nodes that take no part in a (b, k): their rows of every result are zero, and nothing of theirs is read."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels import EdgeUpdate, EmotionGraph, edge_readout, graph_attention, native

needs_native = pytest.mark.skipif(not native.available(), reason="the compiled extension is missing")

RESOLUTIONS = 3


@pytest.fixture
def uninitialized_is_nan():
    """Memory that an operator allocates holds NaN, so that what it forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 3])
def threads(request):
    """Torch's number of threads; with 3 the rows of a large head are zeroed in pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def side_by_side(*shape: int) -> torch.Tensor:
    """[B, K, N, d] whose heads lie side by side, as a projection's result does."""
    batch, resolutions, nodes, dim = shape
    return torch.randn(batch, nodes, resolutions, dim, dtype=torch.float64).transpose(1, 2).requires_grad_()


def one_after_another(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@needs_native
@pytest.mark.usefixtures("uninitialized_is_nan", "threads")
@pytest.mark.parametrize("draw", [side_by_side, one_after_another])
@pytest.mark.parametrize("receivers", ["all", "words"])
@pytest.mark.parametrize("batch, words, emotions", [(3, 17, 5), (1, 700, 20), (2, 1, 1)])
def test_rows_of_absent_nodes_are_zero(make, assert_same, draw, receivers, batch, words, emotions):
    graph = make.graph(batch, words, emotions, RESOLUTIONS)
    shape = batch, RESOLUTIONS, words + emotions, 4
    query, key, value, past_query, past_key = (draw(*shape) for _ in range(5))
    gate = torch.randn(shape[:3], dtype=torch.float64, requires_grad=True)
    history = [EdgeUpdate(past_query, past_key, gate, 0.5)]
    leaves = [query, key, value, past_query, past_key, gate]
    outputs = [
        graph_attention(query, key, value, graph, history, receivers=receivers, backend=name)
        for name in ("native", "reference")
    ]
    absent = ~graph.participants()[:, :, : outputs[0].shape[2]]
    assert not outputs[0][absent].any()
    gradients = torch.autograd.grad(outputs[0].square().sum(), leaves, retain_graph=True)
    assert not any(g[~graph.participants()].any() for g in gradients)
    assert_same(outputs[:1], outputs[1:], leaves, 1e-11)
    readouts = [edge_readout(graph, history, scale=0.5, backend=name) for name in ("native", "reference")]
    assert_same(*readouts, [past_query, past_key, gate], 1e-11)


def readout_problem(make, per_word: bool):
    """A call's tensors by name, a graph with absent words and emotions, gradients of the results."""
    graph = make.graph(2, 6, 5, RESOLUTIONS)
    lead = (2, RESOLUTIONS, 11)
    tensors = {
        "word_weight": graph.word_weight,
        "emotion_weight": graph.emotion_weight.detach(),
        "correlation": graph.correlation.detach().expand(2, 5, 5).clone(),
        "gate": torch.randn(lead, dtype=torch.float64),
    }
    for layer in range(2):
        tensors[f"query{layer}"], tensors[f"key{layer}"] = torch.randn(2, *lead, 3, dtype=torch.float64)
    sent = [torch.randn((2, 6, 5) if per_word else (2, 5)), torch.randn(2, 5, 5)]
    return tensors, graph, [x.double() for x in sent]


def read_out(tensors, graph, sent, per_word):
    """Both results and all gradients."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if name != "word_weight"}
    graph = EmotionGraph(
        tensors["word_weight"],
        graph.word_mask,
        leaves["emotion_weight"],
        leaves["correlation"],
        graph.emotion_mask,
    )
    history = [EdgeUpdate(leaves["query0"], leaves["key0"], leaves["gate"], 0.5)]
    history.append(EdgeUpdate(leaves["query1"], leaves["key1"]))
    outputs = edge_readout(graph, history, scale=0.5, per_word=per_word, backend="native")
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), sent)]


@needs_native
@pytest.mark.parametrize("per_word", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_readout_reads_nothing_off_the_graph(make, poison, per_word):
    """NaN and infinity wherever no edge is: in nodes, weights and gradients of what takes no part."""
    tensors, graph, sent = readout_problem(make, per_word)
    expected = read_out(tensors, graph, sent, per_word)

    absent, emotion_mask = ~graph.participants(), graph.emotion_mask
    words = graph.shape[2]
    off = torch.eye(5, dtype=torch.bool) | ~emotion_mask[:, :, None] | ~emotion_mask[:, None, :]
    dirty = {name: x.clone() for name, x in tensors.items()}
    for name in ("query0", "query1", "key0", "key1", "gate"):
        dirty[name][absent] = poison
    for name in ("key0", "key1"):
        dirty[name][:, :, :words] = poison  # words' edges are not read out
    dirty["word_weight"][:] = poison
    dirty["emotion_weight"][~emotion_mask] = poison
    dirty["correlation"][off] = poison
    bad = [x.clone() for x in sent]
    unheard = ~emotion_mask[:, None, :] | absent.all(1)[:, :words, None] if per_word else ~emotion_mask
    bad[0][unheard] = poison
    bad[1][off] = poison
    actual = read_out(dirty, graph, bad, per_word)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@needs_native
@pytest.mark.parametrize("depth", [1, 2])
def test_native_readout_computes_what_is_asked_for(make, depth):
    """Each gradient alone has the bits that it has among all."""
    graph = make.graph(2, 6, 5, RESOLUTIONS)
    history = [make.update(graph, 7) for _ in range(depth)]
    leaves = [x for update in history for x in update]
    leaves += [graph.emotion_weight, graph.correlation]
    outputs = edge_readout(graph, history, backend="native")
    total = sum(x.square().sum() for x in outputs)
    everything = torch.autograd.grad(total, leaves, retain_graph=True)
    for leaf, expected in zip(leaves, everything, strict=True):
        (alone,) = torch.autograd.grad(total, leaf, retain_graph=True)
        assert torch.equal(alone, expected)


SIZES = {"B": 2, "K": 2, "M": 3, "P": 3, "d": 4, "dv": 5}


def call_registered(operator: str, size: dict[str, int], words_only: bool = False):
    """A registered operator's forward and backward, called by themselves on one layer of history."""
    B, K, M, P, d, dv = size.values()
    lead, run = (B, K, M + P), torch.ops.ecore_kernels
    query, key, past_query, past_key = (torch.rand(*lead, d) for _ in range(4))
    value, factor = torch.rand(*lead, dv), torch.rand(lead)
    mask = torch.ones(B, K, M, dtype=torch.bool)
    weights, past = (torch.rand(B, P), torch.rand(P, P)), ([past_query], [past_key])
    last = 0.5, words_only
    if operator == "edge_readout":
        outputs = run.fused_edge_readout(mask, *weights, None, *past, factor, *last, "ieee", "native")
        gradients = run.fused_edge_readout_backward(
            *map(torch.ones_like, outputs), mask, *weights, None, *past, factor, *last, [True] * 5, "ieee", "native"
        )  # fmt: skip
        return [*outputs, *gradients]
    output, saved = run.fused_graph_attention(
        query, key, value, torch.rand(B, M), mask, *weights, None, *past, factor, *last, "ieee", "native"
    )
    gradients = run.fused_graph_attention_backward(
        torch.ones_like(output), query, key, value, mask, weights[1], None, *past, factor, output, saved, *last,
        [True] * 8, "ieee", "native",
    )  # fmt: skip
    return [output, *gradients]


@needs_native
@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("words_only", [False, True])
@pytest.mark.parametrize("name", ["B", "d", "dv"])
@pytest.mark.parametrize("operator", ["graph_attention", "edge_readout"])
def test_registered_operators_take_empty_tensors(operator, name, words_only):
    assert all(x.isfinite().all() for x in call_registered(operator, SIZES | {name: 0}, words_only))


@needs_native
@pytest.mark.parametrize("words_only", [False, True])
@pytest.mark.parametrize("gone", [["K"], ["M"], ["P"], ["M", "P"]], ids=str)
@pytest.mark.parametrize("operator", ["graph_attention", "edge_readout"])
def test_registered_operators_refuse_graphs_without_nodes(operator, gone, words_only):
    with pytest.raises(ValueError, match=f"^{operator}: expected at least one resolution, one word"):
        call_registered(operator, SIZES | dict.fromkeys(gone, 0), words_only)
