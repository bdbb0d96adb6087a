"""The fused kernels of edge_attention against the plain PyTorch of the reference, which runs in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ecore_kernels import reference
from tests.kernels.triton.fused import Fused

pytest.importorskip("triton")
edge_attention = Fused("edge_attention")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _nothing_is_initialised(monkeypatch):
    """Memory that nobody has written holds NaN."""

    def filled(make):
        def make_filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return make_filled

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, filled(getattr(torch.Tensor, name)))


def make(
    device, nodes, dim=7, value_dim=5, *, batch=1, resolutions=2, edge=None, neighbors="own", gated=True,
    dtype=torch.float64,
):  # fmt: skip
    """Random inputs and output gradients.

    ``edge`` and ``neighbors`` are their sizes over batch and resolution; None, and "own", is full size.
    """
    lead = (batch, resolutions, nodes)
    number = torch.promote_types(dtype, torch.float32)

    def random(*shape, of=dtype):
        return torch.randn(shape, dtype=torch.float64).to(device, of)

    if neighbors is not None:
        size = lead[:2] if neighbors == "own" else neighbors
        neighbors = (torch.rand(*size, nodes, nodes) > 0.5).to(device)
    return SimpleNamespace(
        query=random(*lead, dim),
        key=random(*lead, dim),
        value=random(*lead, value_dim),
        edge=random(*(edge or lead[:2]), nodes, nodes, of=number),
        neighbors=neighbors,
        factor=random(*lead, of=number) if gated else None,
        scale=dim**-0.5,
        grad_output=random(*lead, value_dim),
        grad_new_edge=random(*lead, nodes, of=number) if gated else None,
    )


def run(given, needs_edge=True):
    """Outputs and gradients of the kernels, by name."""
    nothing = (None,) * 3
    tensors = (given.query, given.key, given.value, given.edge, given.neighbors, None, given.factor, *nothing)
    numbers = (given.scale, None, 0.0, False)
    output, new_edge, _, saved = edge_attention.forward(*tensors, *numbers, False, "ieee")
    needs = [True, True, True, needs_edge, False, given.factor is not None, False, False]
    gradients = edge_attention.backward(
        given.grad_output, given.grad_new_edge, None, *tensors, output, saved, *numbers, needs, "ieee"
    )  # fmt: skip
    wanted = (*(["edge"] if needs_edge else []), *([] if given.factor is None else ["factor"]))
    results = dict(zip(("output", "query", "key", "value", *wanted), (output, *gradients), strict=True))
    missing = {"new_edge": None if given.factor is None else new_edge, "edge": None, "factor": None}
    return missing | results


def oracle(given):
    """The same of the reference, in float64."""

    def leaf(tensor):
        return None if tensor is None else tensor.detach().double().requires_grad_()

    query, key, value, edge, factor = map(
        leaf, (given.query, given.key, given.value, given.edge, given.factor)
    )
    complete = torch.ones((), dtype=torch.bool, device=query.device).expand(1, 1, *edge.shape[2:])
    neighbors = complete if given.neighbors is None else given.neighbors
    one = None if factor is None else torch.ones((), dtype=torch.float64, device=query.device)
    outputs = reference.edge_attention(query, key, value, edge, neighbors, factor, one, given.scale)
    weighed = [(outputs[0], given.grad_output.double())]
    if given.grad_new_edge is not None:
        weighed.append((outputs[1], given.grad_new_edge.double()))
    leaves = {"query": query, "key": key, "value": value, "edge": edge, "factor": factor}
    leaves = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    gradients = torch.autograd.grad(
        [tensor for tensor, _ in weighed],
        list(leaves.values()),
        [gradient for _, gradient in weighed],
        materialize_grads=True,
    )
    return {"output": outputs[0], "new_edge": outputs[1], **dict(zip(leaves, gradients, strict=True))}


def assert_same(given, **loose):
    """Assert that the kernels give what the reference gives, in norm; ``loose`` has tolerances by name."""
    actual, expected = run(given), oracle(given)
    for name, got in actual.items():
        wanted = expected.get(name)
        if wanted is None:
            assert got is None, name
            continue
        assert got.shape == wanted.shape, name
        error = (got.double() - wanted).norm().item()
        tolerance = loose.get(name, TOLERANCE[given.query.dtype])
        assert error <= tolerance * wanted.norm().item(), (name, error, wanted.norm().item())
    return actual


SIZES = [(1, 1, 1), (1, 100, 7), (17, 128, 100), (63, 1, 7), (64, 7, 100), (65, 100, 128), (111, 7, 5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("nodes, dim, value_dim", SIZES)
def test_sizes(device, nodes, dim, value_dim, dtype):
    assert_same(make(device, nodes, dim, value_dim, dtype=dtype, resolutions=1 if nodes > 60 else 2))


@pytest.mark.parametrize(
    "edge, neighbors",
    [
        ((1, 1), (2, 3)),
        ((1, 1), None),
        ((2, 1), (1, 3)),
        ((2, 1), (1, 1)),
        ((1, 3), (2, 1)),
        ((1, 3), None),
        ((2, 3), (1, 1)),
        ((2, 3), (2, 1)),
        ((2, 3), None),
    ],
)
def test_broadcasts(device, edge, neighbors):
    nodes = 9 if edge == (2, 3) else 17  # shared edges go tile by tile: more than one of them
    assert_same(make(device, nodes, batch=2, resolutions=3, edge=edge, neighbors=neighbors))


@pytest.mark.parametrize("edge", [(1, 1), (2, 2)])
def test_without_updated_edges(device, edge):
    given = make(device, 18, batch=2, edge=edge, gated=False)
    assert assert_same(given)["new_edge"] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("edge", [(1, 1), (1, 2)])
def test_without_neighbors(device, edge, dtype):
    given = make(device, 20, edge=edge, dtype=dtype)
    given.neighbors[:, 0, 3] = False
    given.neighbors[:, 0, 17] = False
    given.neighbors[:, 0, :, 5] = False  # nobody hears node 5
    given.neighbors[:, 1] = False
    got = assert_same(given)
    for name in ("output", "query", "factor"):
        assert not got[name][:, 0, [3, 17]].any()
        assert not got[name][:, 1].any()
    for name in ("key", "value"):
        assert not got[name][:, 0, 5].any()
        assert not got[name][:, 1].any()
    assert not got["new_edge"][~given.neighbors].any()
    assert not got["edge"][~given.neighbors.any(1, keepdim=edge == (1, 1)).expand(*edge, 20, 20)].any()


def test_nothing_off_the_graph_is_read(device):
    given = make(device, 19, batch=2, edge=(1, 2), neighbors=(1, 2))
    off = ~given.neighbors
    given.edge.masked_fill_(off, 0.0)
    given.grad_new_edge.masked_fill_(off, 0.0)
    expected = run(given)
    given.edge.masked_fill_(off, float("nan"))
    given.grad_new_edge.masked_fill_(off, float("inf"))
    for name, tensor in run(given).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("edge", [(1, 1), (2, 2)])
def test_only_the_output_matters(device, edge):
    given = make(device, 18, batch=2, edge=edge)
    given.grad_new_edge = None
    assert not assert_same(given)["factor"].any()


@pytest.mark.parametrize("edge", [(1, 1), (2, 2)])
def test_only_the_updated_edges_matter(device, edge):
    given = make(device, 18, batch=2, edge=edge)
    given.grad_output.zero_()
    got = assert_same(given)
    assert got["query"].any()
    assert not got["value"].any()


def test_edges_without_gradient(device):
    given = make(device, 18, batch=2, edge=(1, 2))
    expected = run(given)
    got = run(given, needs_edge=False)
    assert got["edge"] is None
    for name in ("query", "key", "value", "factor"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)


def test_layouts(device):
    given = make(device, 18, 7, 5, batch=2, resolutions=3, edge=(2, 1))

    def apart(tensor):  # heads side by side, as a projection leaves them
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    given.query, given.value = apart(given.query), torch.cat([given.value] * 2, 3)[..., 5:]
    given.grad_output = given.grad_output[:1, :, :, :1].expand(2, 3, 18, 5)
    given.edge, given.neighbors = given.edge.mT, given.neighbors.mT
    given.grad_new_edge = given.grad_new_edge[:, :1].expand(2, 3, 18, 18)
    given.factor = given.factor.mT.contiguous().mT
    got = assert_same(given)
    for name in ("query", "key"):
        assert got[name].transpose(1, 2).is_contiguous()
    assert got["new_edge"].is_contiguous()
    given.value = apart(given.value)
    assert assert_same(given)["output"].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(18,), (18, 1), ()])
def test_edges_without_rows_or_columns(device, shape):
    given = make(device, 18, edge=(1, 1), neighbors=(1, 1))
    given.edge = torch.randn(shape, dtype=torch.float64, device=given.query.device).expand(1, 1, 18, 18)
    given.neighbors = (torch.rand(18, device=given.query.device) > 0.5).expand(1, 1, 18, 18)
    given.grad_new_edge = torch.ones((), dtype=torch.float64, device=given.query.device).expand(1, 2, 18, 18)
    assert_same(given)


def test_scores_far_beyond_the_exponential(device):
    given = make(device, 33)
    given.scale = 300.0
    got = assert_same(given)
    assert all(tensor.isfinite().all() for tensor in got.values())


@pytest.mark.parametrize("edge", [(1, 1), (1, 2)])
def test_edges_of_16_bits(device, edge):
    given = make(device, 18, edge=edge, dtype=torch.float32)
    given.edge = given.edge.half()
    got = assert_same(given, edge=1e-3)
    assert got["edge"].dtype is torch.float16
    assert got["new_edge"].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_16_bits(device, dtype):
    if dtype is torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    got = assert_same(make(device, 33, 100, 100, dtype=dtype))
    for name in ("output", "query", "key", "value"):
        assert got[name].dtype is dtype
    for name in ("new_edge", "edge", "factor"):
        assert got[name].dtype is torch.float32


@pytest.mark.parametrize("edge", [(1, 1), (2, 2)])
def test_same_bits_every_run(device, edge):
    given = make(device, 18, batch=2, edge=edge, dtype=torch.float32)
    first, second = run(given), run(given)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
