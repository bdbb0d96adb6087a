"""Scales, and arguments that are refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental import symbolic_shapes

from ecore_kernels import (
    EdgeList,
    EdgeUpdate,
    EmotionGraph,
    MultiResolutionEdgeAttention,
    QuantizedLinear,
    Sequences,
    available_backends,
    edge_attention,
    edge_readout,
    graph_attention,
    linear_cross_entropy,
    native,
    otsu,
    quantized_linear,
    use_backend,
    varlen_attention,
)
from ecore_kernels.nn import EdgeAttention


class Calls:
    """Every operator on one problem, as a function of the scale."""

    def __init__(self, make) -> None:
        self.graph = make.graph(2, 3, 2, 2)
        self.history = [make.update(self.graph, 4)]
        update = make.update(self.graph, 4)
        self.query, self.key, self.value = update.query, update.key, make.value(self.graph, 3)
        self.sequences = Sequences.from_lengths([5, 5])
        self.edge, self.neighbors = (x.detach() for x in self.graph.dense())

    def dense(self, scale, **options):
        return edge_attention(
            self.query, self.key, self.value, self.edge, self.neighbors, scale=scale, **options
        )[0]

    def attention(self, scale):
        return graph_attention(self.query, self.key, self.value, self.graph, self.history, scale=scale)

    def rows(self, scale):
        nodes = [x.transpose(1, 2).flatten(0, 1) for x in (self.query, self.key, self.value)]  # [B * N, K, d]
        return varlen_attention(*nodes, self.sequences, scale=scale)

    def readout(self, scale):
        return torch.cat([x.flatten() for x in edge_readout(self.graph, self.history, scale=scale)])


OPERATORS = ["dense", "attention", "readout"]
NAMES = {
    "dense": "edge_attention",
    "attention": "graph_attention",
    "readout": "edge_readout",
    "rows": "varlen_attention",
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_scale_is_one_over_the_root(make, operator):
    call = getattr(Calls(make), operator)
    torch.testing.assert_close(call(None), call(0.5))
    torch.testing.assert_close(call(1), call(1.0))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_scale_in_a_tensor_gets_its_gradient(make, operator, shape, backend):
    call = getattr(Calls(make), operator)
    scale = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    output = call(scale)
    torch.testing.assert_close(output, call(0.3))
    weights = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, scale, weights)
    step = 1e-6
    with torch.no_grad():
        difference = (call(0.3 + step) - call(0.3 - step)) / (2 * step)
    assert gradient.shape == scale.shape
    torch.testing.assert_close(gradient.reshape(()), (difference * weights).sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(
    not hasattr(symbolic_shapes, "has_static_value"), reason="torch 2.7 compiles anew for every number"
)
@pytest.mark.usefixtures("backend", "fresh_compile")
@pytest.mark.parametrize("operator", OPERATORS)
def test_scales_do_not_compile_anew(make, operator):
    """Once for the first number, once for any."""
    call = getattr(Calls(make), operator)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    frames = []
    for scale in (0.1, 0.2, 0.3, 0.5, 0.7):
        expected = call(scale)
        torch.testing.assert_close(compiled(scale), expected)
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1]


@pytest.mark.parametrize("name", ["reference", "native"])
def test_no_scale_of_sequences_is_one_over_the_root(make, name):
    if name not in available_backends():
        pytest.skip(f"{name} does not run here")
    call = Calls(make).rows
    with use_backend(name):
        torch.testing.assert_close(call(None), call(0.5))
        torch.testing.assert_close(call(1), call(1.0))


@pytest.mark.parametrize("wrong", ["0.5", 1j, [0.5], torch.ones(2), torch.ones((), dtype=torch.complex64)])
@pytest.mark.parametrize("operator", NAMES)
def test_other_scales_are_refused(make, operator, wrong):
    with pytest.raises(ValueError, match=f"{NAMES[operator]}: scale: expected "):
        getattr(Calls(make), operator)(wrong)


def test_refused_by_name(make):
    calls = Calls(make)
    query, key, value, graph = calls.query, calls.key, calls.value, calls.graph
    gate = torch.randn(2, 2, 5)
    update = EdgeUpdate(query, key, gate.to(torch.complex64), 1.0)
    for call, message in (
        (
            lambda: calls.dense(1.0, gate=gate.to(torch.complex64), edge_scale=1.0),
            "edge_attention: gate: expected real numbers, got torch.complex64",
        ),
        (
            lambda: calls.dense(1.0, gate=gate, edge_scale=1j),
            "edge_attention: edge_scale: expected a number, got complex",
        ),
        (
            lambda: calls.dense(1.0, gate=gate, edge_scale=torch.ones((), dtype=torch.complex64)),
            "edge_attention: edge_scale: expected real numbers",
        ),
        (
            lambda: edge_attention(query, key, value, calls.edge.to_sparse()),
            "edge_attention: edge: expected a dense tensor, got torch.sparse_coo",
        ),
        (
            lambda: edge_attention(query, key, value, calls.edge, calls.neighbors.to_sparse()),
            "edge_attention: neighbors: expected a dense tensor, got torch.sparse_coo",
        ),
        (lambda: edge_attention(query, key, value, 1.0), "edge: expected a tensor, got float"),
        (lambda: edge_attention(query.to_sparse(), key, value, calls.edge), "query: expected a dense tensor"),
        (
            lambda: edge_attention(query.to(torch.complex64), key, value, calls.edge),
            "query: expected real numbers",
        ),
        (
            lambda: graph_attention(query, key, value, graph, [update]),
            r"graph_attention: history\[0\].gate: expected real numbers, got torch.complex64",
        ),
        (
            lambda: edge_readout(graph, [update]),
            r"edge_readout: history\[0\].gate: expected real numbers",
        ),
        (
            lambda: graph_attention(query, key, value, calls.edge),
            "graph: expected an EmotionGraph, got Tensor",
        ),
        (
            lambda: MultiResolutionEdgeAttention(0, 2),
            "dim: expected a positive multiple of the 2 resolutions, got 0",
        ),
        (lambda: MultiResolutionEdgeAttention(4, 0), "resolutions: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


WORDS_AND_EMOTIONS = (
    torch.ones(1, 3),
    torch.ones(1, 2, 3, dtype=torch.bool),
    torch.ones(1, 2),
    torch.ones(2, 2),
)
ROWS, TARGET = torch.ones(3, 2, 4), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: otsu([0.1, 0.2]), "otsu: values: expected a tensor, got list"),
        (lambda: otsu(ROWS[0], 2.5), "otsu: max_relevant: expected at least 1 or None, got 2.5"),
        (
            lambda: EmotionGraph(None, *WORDS_AND_EMOTIONS[1:]),
            "EmotionGraph: word_weight: expected a tensor, got NoneType",
        ),
        (
            lambda: EmotionGraph.from_intensity(ROWS[0], [4, 4], (0.1,), ROWS[0]),
            "from_intensity: lengths: expected a tensor, got list",
        ),
        (
            lambda: EmotionGraph.from_intensity(ROWS[0], TARGET[:2], 0.1, ROWS[0]),
            "from_intensity: thresholds: expected a sequence of numbers, got float",
        ),
        (lambda: Sequences.from_lengths(3), r"Sequences: lengths: expected integers \[B\], got int"),
        (lambda: Sequences.from_offsets(None), r"Sequences: offsets: expected integers \[B\], got NoneType"),
        (
            lambda: EdgeList.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), 2.0),
            r"EdgeList: nodes: expected a number or \(senders, receivers\), got 2.0",
        ),
        (
            lambda: linear_cross_entropy(ROWS[:, 0], ROWS[:, 1], None, TARGET, ignore_index=None),
            "linear_cross_entropy: ignore_index: expected an int, got None",
        ),
        (
            lambda: linear_cross_entropy(ROWS[:, 0], ROWS[:, 1], None, TARGET, reduction=ROWS),
            r"linear_cross_entropy: reduction: expected mean or sum, got a tensor \[3, 2, 4\] of torch.float32",
        ),
        (
            lambda: QuantizedLinear.of(ROWS[0, :, :0]),
            r"QuantizedLinear: weight: expected \[V, D\] without a size of 0, got \[2, 0\]",
        ),
        (lambda: QuantizedLinear.of(ROWS[0], [0.0]), "QuantizedLinear: bias: expected a tensor, got list"),
        (
            lambda: quantized_linear(None, QuantizedLinear.of(ROWS[0])),
            "quantized_linear: x: expected a tensor, got NoneType",
        ),
        (
            lambda: edge_attention(ROWS[None], ROWS[None], ROWS[None], backend=["native"]),
            r"edge_attention: backend: expected one of triton, native, reference, got \['native'\]",
        ),
        (
            lambda: edge_attention(ROWS[None], ROWS[None], ROWS[None], clamp=ROWS),
            r"edge_attention: clamp: expected \(low, high\), got a tensor \[3, 2, 4\] of torch.float32",
        ),
        (
            lambda: EdgeAttention(4, 2)([[0.0]]),
            "EdgeAttention: query: expected a tensor, got list",
        ),
        (
            lambda: EdgeAttention(4, 2)(ROWS, key_padding_mask=[False]),
            "EdgeAttention: key_padding_mask: expected a tensor, got list",
        ),
    ],
)
def test_arguments_of_another_kind(call, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        call()


@pytest.mark.parametrize("nodes", [np.int64(3), torch.tensor(3), np.array([3, 3]), [3, 3]])
def test_nodes_of_other_integers(nodes):
    edges = EdgeList.from_edge_index(torch.tensor([[0], [1]]), nodes)
    assert (edges.senders, edges.receivers) == (3, 3)


@pytest.mark.skipif(not native.available(), reason="the compiled extension is missing")
def test_inference_tensors(make):
    """They work where no gradient is asked for, and are named where they cannot be saved."""
    calls = Calls(make)
    plain = calls.attention(1.0).detach()
    with torch.inference_mode():
        value = calls.value.detach().clone()
        torch.testing.assert_close(calls.attention(1.0), plain)
    with torch.no_grad():
        calls.value = value
        torch.testing.assert_close(calls.attention(1.0), plain)
    with use_backend("native"):
        for call, name in ((calls.attention, "graph_attention"), (calls.dense, "edge_attention")):
            with pytest.raises(ValueError, match=f"{name}: value: an inference tensor cannot be saved"):
                call(1.0)
    first = calls.history[0]
    with torch.inference_mode():
        key = first.key.detach().clone()
    calls.history = [first._replace(key=key)]
    with use_backend("native"), pytest.raises(ValueError, match=r"history\[0\].key: an inference tensor"):
        calls.readout(1.0)


def test_checks_are_made_once_a_signature(make, monkeypatch):
    """And again for another one: a wrong call after a right one of other shapes is refused."""
    from ecore_kernels.operators import graph_attention as operator

    calls, seen = Calls(make), []
    check = operator._check
    monkeypatch.setattr(operator, "_check", lambda *a, **k: seen.append(1) or check(*a, **k))
    operator._plans.clear()
    for _ in range(3):
        calls.attention(1.0)
    assert len(seen) == 1
    calls.value = calls.value[:, :, :-1]
    for _ in range(2):
        with pytest.raises(ValueError, match="graph_attention: value: expected"):
            calls.attention(1.0)
    assert len(seen) == 3
