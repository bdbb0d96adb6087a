"""Calls without a gradient, which the native backend binds to the layout of their tensors."""

import pytest
import torch

import ecore_kernels
from ecore_kernels import EdgeUpdate, EmotionGraph, native, use_backend
from ecore_kernels.operators import edge_attention, edge_readout, graph_attention

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())

OPERATORS = (graph_attention, edge_attention, edge_readout)
BATCH, RESOLUTIONS, WORDS, EMOTIONS, DIM = 2, 3, 5, 4, 7
NODES = WORDS + EMOTIONS
OPTIONS = {
    "lse": {"return_lse": True},
    "dropout": {"dropout": 0.3, "seed": 11},
    "clamp": {"clamp": (-0.5, 0.25)},
    "all_pairs": {"edge_bias": -0.2, "update": "all"},
    "everything": {
        "edge_bias": 0.5, "edge_scale": 2.0, "clamp": (-2.0, 2.0), "dropout": 0.5, "seed": -3, "return_lse": True,
    },
}  # fmt: skip
CALLS = (
    "graph_attention", "words", "edge_readout", "per_word", "edge_attention", "update", "bias", "sender_gate",
    *OPTIONS,
)  # fmt: skip


@pytest.fixture(autouse=True)
def bound(monkeypatch):
    """Plans of this test alone."""
    with use_backend("native"):
        for module in OPERATORS:
            monkeypatch.setattr(module, "_plans", {})
        yield


def plans():
    return [plan for module in OPERATORS for plan in module._plans.values()]


def draw(seed, kind=torch.float32, heads_first=True, edge_scale=None, layers=2):
    """A call's tensors; with ``heads_first`` off, heads side by side in memory, as a module makes them."""
    generator = torch.Generator().manual_seed(seed)

    def rows():
        x = torch.randn(BATCH, NODES, RESOLUTIONS, DIM, generator=generator, dtype=kind)
        return x.transpose(1, 2).contiguous() if heads_first else x.transpose(1, 2)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=kind)

    graph = EmotionGraph(
        rand(BATCH, WORDS), rand(BATCH, RESOLUTIONS, WORDS) > 0.3, rand(BATCH, EMOTIONS), rand(EMOTIONS, EMOTIONS),
        rand(BATCH, EMOTIONS) > 0.3,
    )  # fmt: skip
    scales = [rand(1)[0] if edge_scale is None else edge_scale for _ in range(layers)]
    history = [EdgeUpdate(rows(), rows(), rand(BATCH, RESOLUTIONS, NODES), scale) for scale in scales]
    return rows(), rows(), rows(), graph, history


def results(call, query, key, value, graph, history, scale=0.7):
    if call in ("graph_attention", "words"):
        receivers = "words" if call == "words" else "all"
        return [
            ecore_kernels.graph_attention(query, key, value, graph, history, scale=scale, receivers=receivers)
        ]
    if call in ("edge_readout", "per_word"):
        return list(ecore_kernels.edge_readout(graph, history, scale=scale, per_word=call == "per_word"))
    edge, neighbors = graph.dense()
    if call == "bias":
        bias = edge[:, :, :1].transpose(2, 3)[:, :1] - 0.5 * history[0].gate[:1, :1, None]  # [B, 1, N, N]
        return [ecore_kernels.edge_attention(query, key, value, edge, neighbors, bias=bias, scale=scale)[0]]
    if call in OPTIONS or call == "sender_gate":
        options = OPTIONS.get(call, {})
        if call in ("sender_gate", "everything"):
            options = options | {"sender_gate": history[0].gate}
        found = ecore_kernels.edge_attention(query, key, value, edge, neighbors, scale=scale, **options)
        return [x for x in found if x is not None]
    if call == "edge_attention":
        return [ecore_kernels.edge_attention(query, key, value, edge, neighbors, scale=scale)[0]]
    gate, edge_scale = history[0].gate, history[0].edge_scale
    return list(
        ecore_kernels.edge_attention(
            query, key, value, edge, neighbors, gate=gate, edge_scale=edge_scale, scale=scale
        )
    )


def with_gradient(query, key, value, graph, history):
    """The same tensors, wanting gradients: such a call is not bound."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    past = [update._replace(query=update.query.detach().requires_grad_()) for update in history]
    return *leaves, graph, past


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_the_bits_are_those_of_a_call_with_gradients(call, heads_first, kind):
    for seed in (0, 1):  # the second call takes what the first one has bound
        tensors = draw(seed, kind, heads_first)
        free = results(call, *tensors)
        assert [plan.bound is not None for plan in plans()] == [True, False][: seed + 1]
        for one, other in zip(free, results(call, *with_gradient(*tensors)), strict=True):
            assert other.requires_grad
            assert torch.equal(one, other.detach())


@pytest.mark.parametrize("edge_scale", [1, 0.3, 2.0])
@pytest.mark.parametrize("call", ["graph_attention", "edge_readout", "update"])
def test_edge_scales_that_are_numbers(call, edge_scale):
    tensors = draw(0, edge_scale=edge_scale)
    free = results(call, *tensors)
    assert plans()[0].bound is not None
    *rest, history = tensors
    history = [update._replace(edge_scale=torch.tensor(float(edge_scale))) for update in history]
    for one, other in zip(free, results(call, *rest, history), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("call", CALLS)
def test_the_layout_is_the_tensors_own(call):
    """Same shapes, other strides: what was bound to the first must not read the second."""
    first, second = draw(0, heads_first=True), draw(0, heads_first=False)
    for one, other in zip(results(call, *first), results(call, *second), strict=True):
        assert torch.equal(one, other)
    assert len(plans()) == 2


@pytest.mark.parametrize("call", CALLS)
def test_tensors_that_must_be_copied_are_not_bound(call):
    query, key, value, graph, history = draw(0)
    wide = [x.repeat_interleave(2, dim=3)[..., ::2] for x in (query, key, value)]
    past = [update._replace(query=update.query.repeat_interleave(2, dim=3)[..., ::2]) for update in history]
    for one, other in zip(
        results(call, query, key, value, graph, history), results(call, *wide, graph, past), strict=True
    ):
        assert torch.equal(one, other)
    assert [plan.bound is None for plan in plans()] == [False, True]


@pytest.mark.parametrize("call", CALLS)
def test_the_default_device_is_not_the_tensors(call):
    tensors = draw(0)
    expected = results(call, *tensors)
    edge_and_neighbors = tensors[3].dense()
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(EmotionGraph, "dense", lambda _: edge_and_neighbors)
        found = results(call, *tensors)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("call", CALLS)
def test_results_are_new_memory(call):
    tensors = draw(0)
    first, second = results(call, *tensors), results(call, *tensors)
    assert all(one.data_ptr() != other.data_ptr() for one, other in zip(first, second, strict=True))


def test_numbers_and_seeds_of_a_bound_call_may_change():
    """A layout bound by one call serves later calls with another seed, other sender gates and another edge bias."""
    query, key, value, graph, history = draw(0)
    edge, neighbors = graph.dense()
    heard = neighbors.expand(BATCH, RESOLUTIONS, NODES, NODES)

    def call(seed, edge_bias=0.25, factor=1.0):
        return ecore_kernels.edge_attention(
            query, key, value, edge, neighbors, edge_bias=edge_bias, sender_gate=factor * history[0].gate, scale=0.7,
            dropout=0.5, seed=seed,
        )  # fmt: skip

    first, updated = call(0)
    assert [plan.bound is not None for plan in plans()] == [True]
    assert not torch.equal(first, call(1)[0])
    assert torch.equal(first, call(torch.tensor([0]))[0])  # a seed is no part of a plan
    assert not torch.equal(first, call(0, factor=2.0)[0])
    torch.testing.assert_close(call(0, edge_bias=1.25)[1], torch.where(heard, updated + 1, updated))
    assert len(plans()) == 1
    drawn = [call(None)[0] for _ in range(2)]
    assert not torch.equal(*drawn)


def test_wrong_seeds_are_refused_after_right_ones():
    query, key, value, *_ = draw(0)
    for seed in (2**64, 1.5, torch.tensor([1, 2])):
        ecore_kernels.edge_attention(query, key, value, dropout=0.5, seed=0)
        with pytest.raises(ValueError, match="seed"):
            ecore_kernels.edge_attention(query, key, value, dropout=0.5, seed=seed)
