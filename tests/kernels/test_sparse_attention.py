"""Attention over sparse graphs: published layers written out plainly, every gradient, and the same bits every time."""

from __future__ import annotations

import dataclasses
import itertools
import statistics

import pytest
import torch
from torch import Tensor

from ecore_kernels import EdgeList, edge_attention, explain, native, sparse_attention, triton_kernels

needs_native = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
needs_interpreter = pytest.mark.skipif(
    not triton_kernels.INTERPRETED or bool(triton_kernels.unavailable_reason()),
    reason="Triton's interpreter is not in use: TRITON_INTERPRET is not 1, or Triton is missing",
)
FUSED = [
    pytest.param("native", marks=needs_native),
    pytest.param("triton", id="interpreter", marks=needs_interpreter),
]
backends = pytest.mark.parametrize("backend", ["reference", *FUSED])
fused = pytest.mark.parametrize("backend", FUSED)
VECTORS = ("key_scale", "key_offset", "value_offset")
ALL = ("edge", "bias", *VECTORS)


def graph(receivers: int = 7, senders: int = 9, edges: int = 30, seed: int = 0) -> EdgeList:
    """Random edges, some of them twice; receiver 0 and sender 0 have none."""
    generator = torch.Generator().manual_seed(seed)
    sender = torch.randint(1, senders, (edges,), generator=generator)
    receiver = torch.randint(1, receivers, (edges,), generator=generator)
    return EdgeList.from_edge_index(torch.stack([sender, receiver]), (senders, receivers))


def tensors(
    edges: EdgeList, heads=2, dim=5, value_dim=3, dtype=torch.float64, names=ALL
) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {
        "query": (edges.receivers, heads, dim),
        "key": (edges.senders, heads, dim),
        "value": (edges.senders, heads, value_dim),
        "edge": (len(edges), heads),
        "bias": (len(edges), heads),
        "key_scale": (len(edges), heads, dim),
        "key_offset": (len(edges), heads, dim),
        "value_offset": (len(edges), heads, value_dim),
    }
    wanted = ("query", "key", "value", *names)
    return {name: torch.randn(shapes[name], dtype=dtype, requires_grad=True) for name in wanted}


def plain(edges: EdgeList, given: dict[str, Tensor], scale: float) -> Tensor:
    """The docstring's formula, receiver by receiver."""
    rows = []
    for i in range(edges.receivers):
        mine = (edges.receiver == i).nonzero()[:, 0]
        j = edges.sender[mine]
        keys, values = given["key"][j], given["value"][j]
        keys = keys * given["key_scale"][mine] if "key_scale" in given else keys
        keys = keys + given["key_offset"][mine] if "key_offset" in given else keys
        x = scale * torch.einsum("hd,ehd->eh", given["query"][i], keys)
        x = x * given["edge"][mine] if "edge" in given else x
        x = x + given["bias"][mine] if "bias" in given else x
        values = values + given["value_offset"][mine] if "value_offset" in given else values
        rows.append(torch.einsum("eh,ehd->hd", x.softmax(0), values))
    return torch.stack(rows)


def run(edges: EdgeList, given: dict[str, Tensor], backend: str, scale: float | None = 0.5) -> Tensor:
    options = {name: x for name, x in given.items() if name in ALL}
    return sparse_attention(
        given["query"], given["key"], given["value"], edges, **options, scale=scale, backend=backend
    )


CHOICES = {n: [*itertools.combinations(ALL, n)] for n in (0, 1, 2, 5)}
FEW = CHOICES[0] + CHOICES[1] + CHOICES[5]


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        *(pytest.param("reference", names) for names in FEW + CHOICES[2]),
        *(pytest.param("native", names, marks=needs_native) for names in FEW + CHOICES[2]),
        *(pytest.param("triton", names, marks=needs_interpreter) for names in FEW),
    ],
)
def test_values_and_gradients_are_the_formulas(backend, names):
    edges = graph()
    given = tensors(edges, names=names)
    expected, found = plain(edges, given, 0.5), run(edges, given, backend)
    assert found[0].eq(0).all()  # nobody is heard there
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(expected)
    leaves = list(given.values())
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for name, a, b in zip(given, torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("backend", "dim"),
    [
        *(pytest.param("native", dim, marks=needs_native) for dim in (1, 2, 7, 8, 16, 17, 33, 100)),
        *(pytest.param("triton", dim, marks=needs_interpreter) for dim in (1, 33, 129)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_sizes(backend, dim, dtype):
    """And more edges a node than Triton's kernels take in one step."""
    edges = graph(23, 31, 200, seed=dim) if backend == "native" else graph(3, 4, 45, seed=dim)
    given = tensors(edges, heads=3 if backend == "native" else 1, dim=dim, value_dim=dim + 1, dtype=dtype)
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    found, expected = run(edges, given, backend, None), plain(edges, exact, dim**-0.5)
    rtol = 1e-4 if dtype is torch.float32 else 1e-10
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(found, list(given.values()), upstream.to(dtype))
    for a, b in zip(got, torch.autograd.grad(expected, list(exact.values()), upstream), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=10 * rtol, atol=10 * rtol)


@backends
def test_gradcheck(backend):
    edges = graph(3, 4, 7) if backend != "triton" else graph(2, 3, 4)
    given = tensors(edges, heads=1, dim=2, value_dim=2)

    def call(*leaves):
        return run(edges, dict(zip(given, leaves, strict=True)), backend)

    leaves, fast = (
        tuple(given.values()),
        backend == "triton",
    )  # interpreted, the whole Jacobian takes a minute
    assert torch.autograd.gradcheck(call, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=fast)


@backends
def test_a_dense_graph_is_edge_attention(backend):
    nodes, heads, dim = 6, 2, 4
    torch.manual_seed(0)
    neighbors = torch.rand(nodes, nodes) < 0.6
    neighbors.fill_diagonal_(True)
    query, key, value = (torch.randn(1, heads, nodes, dim, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(1, heads, nodes, nodes, dtype=torch.float64)
    expected, _ = edge_attention(query, key, value, weight, neighbors[None, None], scale=0.3)
    edges = EdgeList.from_dense(neighbors)
    of_edges = weight[0, :, edges.receiver, edges.sender].T  # [E, H]
    found = sparse_attention(
        *(x[0].transpose(0, 1) for x in (query, key, value)), edges, edge=of_edges, scale=0.3, backend=backend
    )
    torch.testing.assert_close(found, expected[0].transpose(0, 1))


@backends
def test_transformer_conv(backend):
    """PyTorch Geometric's TransformerConv (Shi et al., 2021, Eqs. 3 and 4): edge vectors on key and value."""
    edges = graph()
    given = tensors(edges, dim=4, value_dim=4, names=())
    vector = torch.randn(len(edges), 2, 4, dtype=torch.float64, requires_grad=True)
    found = sparse_attention(
        *given.values(), edges, key_offset=vector, value_offset=vector, scale=None, backend=backend
    )
    query, key, value = given.values()
    rows = [torch.zeros(2, 4, dtype=torch.float64) for _ in range(edges.receivers)]
    for i in range(edges.receivers):
        mine = [e for e in range(len(edges)) if int(edges.receiver[e]) == i]
        if mine:
            x = torch.stack([(query[i] * (key[edges.sender[e]] + vector[e])).sum(-1) / 2 for e in mine])
            weight = x.exp() / x.exp().sum(0)
            rows[i] = sum(
                weight[n][:, None] * (value[edges.sender[e]] + vector[e]) for n, e in enumerate(mine)
            )
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    leaves = (*given.values(), vector)
    pairs = zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@backends
def test_dwivedis_edge_layer(backend):
    """Dwivedi and Bresson (2021, Eq. 11): the score is the sum of q * k * e; edge vectors multiply the key."""
    edges = graph()
    given = tensors(edges, names=("key_scale",))
    query, key, value, vector = given.values()
    found = run(edges, given, backend, None)
    product = (query[edges.receiver] * key[edges.sender] * vector / 5**0.5).sum(-1)
    total = torch.zeros(edges.receivers, 2, dtype=torch.float64).index_add(0, edges.receiver, product.exp())
    weight = product.exp() / total[edges.receiver]
    expected = torch.zeros_like(found).index_add(0, edges.receiver, weight[:, :, None] * value[edges.sender])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@backends
def test_broadcasting(backend):
    edges = graph()
    given = tensors(edges, names=())
    edge, vector = (
        torch.randn(len(edges), dtype=torch.float64),
        torch.randn(len(edges), 1, 5, dtype=torch.float64),
    )
    leaves = [edge.requires_grad_(), vector.requires_grad_()]
    found = sparse_attention(*given.values(), edges, edge=edge, key_offset=vector, backend=backend)
    whole = {"edge": edge[:, None].expand(-1, 2), "key_offset": vector.expand(-1, 2, -1)}
    expected = plain(edges, given | whole, 1.0)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@needs_native
def test_the_same_bits_with_any_number_of_threads():
    edges = graph(2000, 1500, 30_000)
    given = tensors(edges, heads=2, dim=16, value_dim=16, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            output = run(edges, given, "native")
            results.append((output, *torch.autograd.grad(output.square().sum(), list(given.values()))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@backends
def test_an_index_in_any_order_of_memory(backend):
    """A list of pairs, transposed, as it is often written; and lists made by hand with gaps."""
    edges = graph()
    given = tensors(edges)
    expected = answer(edges, given, torch.ones(7, 2, 3), backend)
    pairs = edges.to_edge_index().T.contiguous()  # [E, 2]
    transposed = EdgeList.from_edge_index(pairs.T, (9, 7))
    gaps = {
        name: torch.stack([x, torch.full_like(x, -1)], 1)[:, 0]
        for name, x in vars(edges).items()
        if isinstance(x, Tensor)
    }
    for other in (transposed, dataclasses.replace(edges, **gaps)):
        found = answer(other, given, torch.ones(7, 2, 3), backend)
        assert all(torch.equal(found[name], x) for name, x in expected.items())


@backends
def test_empty_and_one(backend):
    nothing = EdgeList.from_edge_index(torch.empty(2, 0, dtype=torch.int64), (3, 2))
    given = tensors(nothing)
    output = run(nothing, given, backend)
    assert output.shape == (2, 2, 3)
    assert not output.any()
    assert all(not g.any() for g in torch.autograd.grad(output.sum(), list(given.values())))
    nobody = EdgeList.from_edge_index(torch.empty(2, 0, dtype=torch.int32), (0, 0))
    assert run(nobody, tensors(nobody), backend).shape == (0, 2, 3)


@fused
@pytest.mark.parametrize("bias", [float("-inf"), float("inf"), float("nan")])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_what_is_not_finite_is_as_in_the_reference(backend, bias):
    edges = graph(5, 6, 12)
    given = tensors(edges, names=("bias",))
    with torch.no_grad():
        given["bias"][:3] = bias
        given["bias"][edges.receiver == 4] = bias
    torch.testing.assert_close(
        run(edges, given, backend), run(edges, given, "reference"), equal_nan=True, rtol=1e-12, atol=1e-12
    )


@fused
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_saturated_softmaxes(backend, size):
    """Errors within twice plain PyTorch's in float32, where one edge takes all: medians over nine draws."""
    edges = graph(3, 5, 24)
    margins: dict[str, list[float]] = {}
    for draw in range(9):
        generator = torch.Generator().manual_seed(draw)
        given = {
            name: torch.randn(x.shape, generator=generator) for name, x in tensors(edges, names=()).items()
        }
        given["query"] *= size
        upstream = torch.randn(edges.receivers, 2, 3, generator=generator)
        errors = []
        exact = answer(edges, {name: x.double() for name, x in given.items()}, upstream, "reference")
        for name in (backend, "reference"):
            found = answer(edges, given, upstream, name)
            errors.append({part: float((x.double() - exact[part]).norm()) for part, x in found.items()})
        for part, x in exact.items():
            rounding = torch.finfo(torch.float32).eps * float(x.norm())
            margins.setdefault(part, []).append(2 * errors[1][part] + rounding - errors[0][part])
    for part, found in margins.items():
        assert statistics.median(found) >= 0.0, part


def answer(edges: EdgeList, given: dict[str, Tensor], upstream: Tensor, backend: str) -> dict[str, Tensor]:
    """The output and all gradients by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    output = run(edges, leaves, backend)
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream.to(output.dtype))
    return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))


@needs_interpreter
def test_half_precision_in_triton():
    """Nodes and edge vectors stay in half precision, sums and edge scalars are float32."""
    edges = graph()
    given = tensors(edges, dtype=torch.float16)
    for name in ("edge", "bias"):
        given[name] = (1000 + torch.rand(len(edges), 2)).requires_grad_()  # float16 has no such numbers
    given["edge"] = (given["edge"].detach() / 1000).requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    output, expected = run(edges, given, "triton"), run(edges, exact, "reference")
    assert output.dtype is torch.float16
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)
    found = torch.autograd.grad(output.float().sum(), list(given.values()))
    for leaf, a, b in zip(
        given.values(), found, torch.autograd.grad(expected.sum(), list(exact.values())), strict=True
    ):
        assert a.dtype is leaf.dtype
        torch.testing.assert_close(a.double(), b, rtol=5e-3, atol=5e-3)


@fused
def test_a_gradient_alone_is_as_with_all_others(backend):
    edges = graph(3, 4, 7)
    given = tensors(edges, heads=1)
    every = answer(edges, given, torch.ones(3, 1, 3), backend)
    for name in given:
        leaves = {n: x.detach().requires_grad_(n == name) for n, x in given.items()}
        (alone,) = torch.autograd.grad(run(edges, leaves, backend).sum(), leaves[name])
        assert torch.equal(alone, every[name]), name


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    edges = graph()
    given = tensors(edges, dtype=dtype, names=("edge",))
    output = run(edges, given, "native")
    assert output.dtype is dtype
    exact = run(edges, {name: x.float() for name, x in given.items()}, "native")
    assert torch.equal(output, exact.to(dtype))
    assert all(g.dtype is dtype for g in torch.autograd.grad(output.float().sum(), list(given.values())))


@fused
def test_registered_operators(backend):
    edges = graph(3, 4, 7)
    given = {name: x.detach() for name, x in tensors(edges).items()}
    order = ("query", "key", "value", *ALL)
    lists = (
        edges.sender,
        edges.receiver,
        edges.receiver_begin,
        edges.by_receiver,
        edges.sender_begin,
        edges.by_sender,
    )
    arguments = (*(given[name] for name in order), *lists, 0.5, backend)
    torch.library.opcheck(torch.ops.ecore_kernels.fused_sparse_attention.default, arguments)
    output, weight = torch.ops.ecore_kernels.fused_sparse_attention(*arguments)
    back = (torch.randn_like(output), *arguments[:-2], weight, 0.5, [True] * 8, backend)
    torch.library.opcheck(torch.ops.ecore_kernels.fused_sparse_attention_backward.default, back)


@backends
def test_compiles_as_one_graph(backend):
    edges = graph()
    given = tensors(edges, names=("edge", "key_offset"))
    compiled = torch.compile(lambda g: run(edges, g, backend), fullgraph=True, backend="aot_eager")
    expected, found = run(edges, given, backend), compiled(given)
    torch.testing.assert_close(found, expected)
    leaves = list(given.values())
    for a, b in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": torch.zeros(3, 2, 5)}, r"key: expected \[9, 2, 5\], got \[3, 2, 5\]"),
        ({"value": torch.zeros(9, 3)}, r"expected query \[7, H, d\] and value \[9, H, dv\], got .*"),
        ({"edge": torch.zeros(29)}, r"edge: expected a shape that broadcasts to \[30, 2\], got \[29, 1\]"),
        (
            {"key_scale": torch.zeros(30, 2)},
            r"key_scale: expected a shape that broadcasts to \[30, 2, 5\], got .*",
        ),
        ({"scale": "x"}, "scale: expected a number, got str"),
        ({"edges": torch.zeros(2, 3)}, "edges: expected an EdgeList, got Tensor"),
        ({"query": torch.zeros(7, 2, 5, dtype=torch.int64)}, "query: expected a float type, got torch.int64"),
    ],
)
def test_bad_arguments_are_one_line(change, said):
    edges = graph()
    given = {"edges": edges, **{name: x.detach() for name, x in tensors(edges, names=()).items()}}
    with pytest.raises(ValueError, match=f"^sparse_attention: {said}$"):
        sparse_attention(**(given | change))


def test_explain():
    edges = graph()
    given = tensors(edges, names=())
    assert "sparse_attention:" in explain(sparse_attention, *given.values(), edges)


@needs_interpreter
def test_what_triton_refuses():
    edges = graph()
    for dim, kind, said in (
        (1025, torch.float32, "takes heads of up to 1024, not 1025"),
        (5, torch.bfloat16, "gets bfloat16 wrong"),
    ):
        given = tensors(edges, dim=dim, dtype=kind, names=())
        with pytest.raises(RuntimeError, match=said):
            sparse_attention(*given.values(), edges, backend="triton")
