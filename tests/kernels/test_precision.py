"""Low and mixed precision: types out, and errors judged against plain PyTorch in the same type."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels import (
    EdgeUpdate,
    EmotionGraph,
    edge_attention,
    edge_readout,
    graph_attention,
    native,
)
from ecore_kernels.operators import registration

LOW = [torch.bfloat16, torch.float16]


def inputs(words=24, emotions=8, dim=20, layers=2):
    """A float32 graph and float32 layers."""
    graph = EmotionGraph.from_intensity(
        torch.rand(2, words) * 0.25,
        torch.tensor([words, words - 5]),
        (0.0, 0.1),
        torch.randn(emotions, emotions).softmax(-1),
    )
    lead = (2, 2, words + emotions)
    updates = [
        EdgeUpdate(torch.randn(*lead, dim), torch.randn(*lead, dim), torch.randn(lead), torch.randn(()))
        for _ in range(layers)
    ]
    return graph, updates, torch.randn(*lead, dim)


def plain(updates, value, edge, neighbors, scale):
    """The recurrence as anybody would write it, in the type of its inputs: output, last edges."""
    for query, key, gate, edge_scale in updates:
        weighted = scale * (query @ key.mT) * edge
        output = weighted.masked_fill(~neighbors, -1e4).softmax(-1).masked_fill(~neighbors, 0.0) @ value
        edge = (gate[..., None] * edge_scale * (edge + weighted)).masked_fill(~neighbors, 0.0)
    return output, edge


def error(actual, exact):
    return float((actual.double() - exact).abs().max())


@pytest.mark.parametrize("dtype", LOW)
def test_error_is_within_twice_plain_pytorchs(dtype):
    graph, updates, value = inputs()
    scale = 20**-0.5

    def rounded(x):
        return x.to(dtype)

    updates, value = [EdgeUpdate(*map(rounded, update)) for update in updates], rounded(value)
    edge, neighbors = graph.dense()
    wide = [EdgeUpdate(*(x.double() for x in update)) for update in updates]
    exact, exact_edge = plain(wide, value.double(), edge.double(), neighbors, scale)
    naive, naive_edge = plain(updates, value, rounded(edge), neighbors, scale)
    rounding = float(exact.abs().max()) * torch.finfo(dtype).eps / 2

    last = updates[-1]
    output = graph_attention(last.query, last.key, value, graph, updates[:-1], scale=scale)
    assert output.dtype == dtype
    assert error(output, exact) <= 2 * error(naive, exact) + rounding

    dense, new_edge = edge_attention(
        updates[0].query, updates[0].key, value, edge, neighbors, gate=updates[0].gate,
        edge_scale=updates[0].edge_scale, scale=scale,
    )  # fmt: skip
    assert dense.dtype == dtype
    assert new_edge.dtype == torch.float32  # edges are float32 whatever the nodes are
    first, first_edge = plain(wide[:1], value.double(), edge.double(), neighbors, scale)
    first_naive, first_naive_edge = plain(updates[:1], value, rounded(edge), neighbors, scale)
    assert error(dense, first) <= 2 * error(first_naive, first) + rounding
    assert error(new_edge, first_edge) <= 2 * error(first_naive_edge, first_edge)

    to_emotion, between = edge_readout(graph, updates, scale=scale)
    assert to_emotion.dtype == between.dtype == torch.float32
    exact_sum, naive_sum = exact_edge[:, :, :24, 24:].sum((1, 2)), naive_edge[:, :, :24, 24:].sum((1, 2))
    assert error(to_emotion, exact_sum) <= 2 * error(naive_sum, exact_sum)
    exact_sum, naive_sum = exact_edge[:, :, 24:, 24:].sum(1), naive_edge[:, :, 24:, 24:].sum(1)
    assert error(between, exact_sum) <= 2 * error(naive_sum, exact_sum)


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_gradients(dtype):
    graph, updates, value = inputs()
    updates = [EdgeUpdate(*(x.to(dtype).requires_grad_() for x in update)) for update in updates]
    value = value.to(dtype).requires_grad_()
    last = updates[-1]
    output = graph_attention(last.query, last.key, value, graph, updates[:-1], scale=0.2)
    leaves = [last.query, last.key, value, *updates[0]]
    gradients = torch.autograd.grad(output.float().square().sum(), leaves)

    wide = [EdgeUpdate(*(x.detach().double().requires_grad_() for x in update)) for update in updates]
    exact_value = value.detach().double().requires_grad_()
    exact = graph_attention(wide[-1].query, wide[-1].key, exact_value, graph, wide[:-1], scale=0.2)
    expected = torch.autograd.grad(
        exact.square().sum(), [wide[-1].query, wide[-1].key, exact_value, *wide[0]]
    )
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert error(gradient, other) <= 4 * torch.finfo(dtype).eps * float(other.abs().max())


@pytest.mark.parametrize(
    "types, expected",
    [
        ((torch.float32, torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float16, torch.float16), torch.float16),
        ((torch.float32, torch.float64, torch.float32), torch.float64),
    ],
)
def test_mixed_inputs(types, expected):
    """Computed in the widest type, the float32 graph's included; given back in the nodes' common type."""
    graph, (past, last), value = inputs()
    query, key, value = (x.to(kind) for x, kind in zip((last.query, last.key, value), types, strict=True))
    output = graph_attention(query, key, value, graph, [past])
    assert output.dtype == expected
    exact = graph_attention(query.double(), key.double(), value.double(), graph, [past])
    torch.testing.assert_close(
        output, exact.to(expected), rtol=2e-3 if expected == torch.float16 else 1e-4, atol=1e-4
    )
    edge, neighbors = graph.dense()
    assert edge_attention(query, key, value, edge, neighbors)[0].dtype == expected
    assert edge_attention(query, key, value, edge.double(), neighbors)[0].dtype == expected


def test_a_float64_graph_keeps_its_precision():
    graph, (past, _), _ = inputs()
    wide = EmotionGraph(
        graph.word_weight.double(), graph.word_mask, graph.emotion_weight.double(), graph.correlation.double()
    )
    assert edge_readout(wide, [past])[0].dtype == torch.float64
    assert edge_readout(graph, [past])[0].dtype == torch.float32


def test_the_gate_of_dense_edges_is_multiplied_in_float32():
    query, key, value = torch.randn(3, 1, 2, 6, 4)
    gate, edge_scale, edge = torch.randn(1, 2, 6).bfloat16(), torch.tensor(1.1), torch.rand(6, 6)
    _, new_edge = edge_attention(query, key, value, edge, gate=gate, edge_scale=edge_scale)
    expected = gate.double()[..., None] * 1.1 * edge.double() * (1 + query.double() @ key.double().mT)
    torch.testing.assert_close(new_edge.double(), expected, rtol=1e-5, atol=1e-5)


def test_float32_is_multiplied_as_torch_is_set_to():
    """By either of torch's settings: after the newer, the older cannot be read."""
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("needs torch 2.9")
    before = settings.fp32_precision
    nodes = torch.randn(1, 1, 5, 4)
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "ieee"), (before, "ieee")):
            settings.fp32_precision = setting
            assert registration._matmul_precision() == expected
            edge_attention(nodes, nodes, nodes, torch.ones(5, 5))
    finally:
        settings.fp32_precision = before
    for setting, expected in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
        torch.set_float32_matmul_precision(setting)
        assert registration._matmul_precision() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_on_cpu_computes_in_float32(dtype):
    graph, (past, last), value = inputs()
    query, key, value = (x.to(dtype) for x in (last.query, last.key, value))
    edge, neighbors = graph.dense()
    history = [EdgeUpdate(past.query.to(dtype), past.key.to(dtype), past.gate.to(dtype), past.edge_scale)]
    with torch.autocast("cpu", torch.bfloat16):
        actual = [
            graph_attention(query, key, value, graph, history),
            *edge_attention(query, key, value, edge, neighbors, gate=past.gate, edge_scale=past.edge_scale),
            *edge_readout(graph, history),
        ]
    query, key, value = query.float(), key.float(), value.float()
    history = [EdgeUpdate(*(x.float() for x in history[0]))]
    expected = [
        graph_attention(query, key, value, graph, history),
        *edge_attention(query, key, value, edge, neighbors, gate=past.gate, edge_scale=past.edge_scale),
        *edge_readout(graph, history),
    ]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert actual[0].dtype == actual[1].dtype == torch.float32


def test_autocast_leaves_float64_alone():
    """As it does with torch's own operators."""
    graph, (past, last), value = inputs()
    nodes = [x.double() for x in (last.query, last.key, value)]
    past = EdgeUpdate(past.query.double(), past.key.double(), past.gate.double(), past.edge_scale)
    edge, neighbors = graph.dense()

    def results():
        return [
            graph_attention(*nodes, graph, [past]),
            *edge_attention(*nodes, edge, neighbors, gate=past.gate, edge_scale=past.edge_scale),
            *edge_readout(graph, [past]),
        ]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        actual = results()
        assert (nodes[0] @ nodes[1].mT).dtype is torch.float64
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
        assert one.dtype is torch.float64


@pytest.mark.skipif(not native.available(), reason="the compiled extension is missing")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_cpu_is_converted_at_the_boundary(dtype):
    """Results and gradients are those of float32, rounded once."""
    graph, (past, last), value = inputs()
    low = [x.detach().to(dtype) for x in (last.query, last.key, value, past.query, past.key)]
    edge, neighbors = graph.dense()

    def run(kind):
        query, key, value, past_query, past_key = leaves = [x.to(kind).requires_grad_() for x in low]
        history = [EdgeUpdate(past_query, past_key, past.gate, past.edge_scale)]
        results = [
            graph_attention(query, key, value, graph, history, backend="native"),
            *edge_attention(
                query, key, value, edge, neighbors, gate=past.gate, edge_scale=1.0, backend="native"
            ),
            *edge_readout(graph, history, backend="native"),
        ]
        weights = [torch.linspace(-1, 1, x.numel()).view_as(x).to(dtype).to(x.dtype) for x in results]
        return results, torch.autograd.grad(results, leaves, weights)

    (results, gradients), (expected, expected_gradients) = run(dtype), run(torch.float32)
    assert [x.dtype for x in results] == [dtype, dtype, *[torch.float32] * 3]
    assert all(x.dtype is dtype for x in gradients)
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other.to(one.dtype))
    for one, other in zip(gradients, expected_gradients, strict=True):
        # Each operator's gradient is rounded before they are added.
        atol = 4 * torch.finfo(dtype).eps * float(other.abs().max())
        torch.testing.assert_close(one.float(), other, rtol=0, atol=atol)
