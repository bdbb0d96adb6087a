"""Options of edge_attention beside edges: other shapes, bias, gates, updates, clamp, dropout, and the softmax's sum."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ecore_kernels import edge_attention, native
from ecore_kernels.philox import philox, threshold


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def mask_of(seed: int, dropout: float, shape: tuple[int, ...]) -> Tensor:
    """Factors of the weights, one pair after the other."""
    heads = shape[1]
    factors = torch.zeros(shape, dtype=torch.float64)
    for b, h, i, j in itertools.product(*map(range, shape)):
        if int(philox(torch.tensor(seed), j, i, b * heads + h, 0)) >= threshold(dropout):
            factors[b, h, i, j] = 1 / (1 - dropout)
    return factors


def spelled(
    query, key, value, edge=None, neighbors=None, *, bias=None, gate=None, edge_scale=None, edge_bias=None,
    sender_gate=None, update="neighbors", scale=1.0, clamp=None, dropout=0.0, seed=None,
):  # fmt: skip
    """The formula, dense and without care for what is not finite. Returns output, new_edge (always) and lse."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    x = scale * torch.einsum("bhid,bhjd->bhij", query, key)
    if clamp is not None:
        low, high = torch.tensor(clamp, dtype=torch.float64)
        x = torch.minimum(torch.maximum(x, low), high)
    edge = torch.ones((), dtype=torch.float64) if edge is None else edge
    x = x * edge * (1.0 if sender_gate is None else sender_gate[:, :, None])
    heard = torch.ones((), dtype=torch.bool) if neighbors is None else neighbors
    powers = (x + (0.0 if bias is None else bias)).exp() * heard
    sums = powers.sum(-1, keepdim=True)
    hears = sums > 0
    sums = torch.where(hears, sums, 1.0)
    weights = powers / sums
    if dropout:
        weights = weights * mask_of(seed, dropout, tuple(x.shape))
    output = torch.einsum("bhij,bhjd->bhid", weights, value)
    factor = torch.ones((), dtype=torch.float64) if gate is None else gate[..., None]
    new_edge = factor * (1.0 if edge_scale is None else edge_scale) * (edge + x)
    new_edge = new_edge + (0.0 if edge_bias is None else edge_bias)
    if update == "neighbors":
        new_edge = new_edge * heard
    return output, new_edge, torch.where(hears, sums.log(), -math.inf)[..., 0]


UPDATE = ("gate", "edge_scale", "edge_bias")
TENSORS = ("edge", "bias", "gate", "edge_scale", "edge_bias", "sender_gate")
FORMS = {
    "nothing": {},
    "edge": {"edge"},
    "bias": {"bias"},
    "bias off a graph": {"bias", "neighbors"},
    "edge, bias": {"edge", "bias", "neighbors"},
    "sender gate": {"sender_gate", "neighbors"},
    "sender gate, edge": {"sender_gate", "edge"},
    "gate alone": {"edge", "gate", "neighbors"},
    "scale alone": {"edge", "edge_scale"},
    "bias of edges alone": {"edge_bias", "neighbors"},
    "affine update of all": {"edge", "edge_scale", "edge_bias", "neighbors", "all"},
    "gated update of all": {"edge", "gate", "sender_gate", "neighbors", "all", "clamp"},
    "clamp": {"clamp", "edge", "gate"},
    "clamp, bias": {"clamp", "bias"},
    "dropout": {"dropout", "edge"},
    "dropout, bias": {"dropout", "bias", "neighbors"},
    "everything": {*TENSORS, "neighbors", "clamp", "dropout"},
    "everything, on all pairs": {*TENSORS, "neighbors", "clamp", "dropout", "all"},
}


class Case:
    """One call, all of its tensors asking for gradients."""

    def __init__(
        self, form, receivers=5, senders=7, dim=4, value_dim=3, heads=(4, 2), shared=((1, 1), (1, 1))
    ):
        wanted, (heads, kept) = FORMS[form], heads
        self.nodes = (
            leaf(2, heads, receivers, dim),
            leaf(2, kept, senders, dim),
            leaf(2, kept, senders, value_dim),
        )
        shapes = {
            "edge": (*((2, heads) if shared[0] is None else shared[0]), receivers, senders),
            "bias": (*((2, heads) if shared[1] is None else shared[1]), receivers, senders),
            "gate": (2, heads, receivers),
            "sender_gate": (2, heads, senders),
            "edge_scale": (),
            "edge_bias": (),
        }
        self.options = {name: leaf(*shape) for name, shape in shapes.items() if name in wanted}
        self.leaves = [*self.nodes, *self.options.values()]
        self.updated = any(name in wanted for name in UPDATE)
        if "neighbors" in wanted:
            mask = torch.rand(2, 1, receivers, senders) > 0.4
            mask[0, 0, 0] = False
            self.options["neighbors"] = mask
        if "all" in wanted:
            self.options["update"] = "all"
        if "clamp" in wanted:
            self.options["clamp"] = (-0.7, 1.1)
        if "dropout" in wanted:
            self.options |= {"dropout": 0.3, "seed": 2**63 + 5}
        self.options["scale"] = dim**-0.5

    def expected(self):
        options = dict(self.options)
        if "seed" in options:
            options["seed"] -= 2**64
        output, new_edge, lse = spelled(*self.nodes, **options)
        return output, new_edge if self.updated else None, lse


@pytest.mark.usefixtures("backend")
class TestFormula:
    @pytest.mark.parametrize("form", FORMS)
    def test_results_and_gradients(self, assert_same, form):
        case = Case(form)
        actual, expected = edge_attention(*case.nodes, **case.options), case.expected()
        assert len(actual) == 2
        assert (actual[1] is not None) == case.updated
        pairs = [(a, e) for a, e in zip(actual, expected[:2], strict=True) if a is not None]
        assert_same(*zip(*pairs, strict=True), case.leaves, 1e-11)

    @pytest.mark.parametrize("shared", list(itertools.product([None, (1, 4), (2, 1), (1, 1)], repeat=2)))
    def test_shared_edges_and_biases(self, assert_same, shared):
        case = Case("everything", shared=shared)
        assert_same(edge_attention(*case.nodes, **case.options), case.expected()[:2], case.leaves, 1e-11)

    @pytest.mark.parametrize("shape", [(), (7,), (5, 1), (2, 1, 1, 7), (4, 5, 7)])
    def test_edges_and_biases_broadcast(self, assert_same, shape):
        case = Case("edge, bias")
        edge, bias = leaf(*shape), leaf(*shape)
        options = case.options | {"edge": edge, "bias": bias}
        expected = spelled(*case.nodes, **options)[:1]
        leaves = [*case.nodes, edge, bias]
        assert_same(edge_attention(*case.nodes, **options)[:1], expected, leaves, 1e-11)

    @pytest.mark.parametrize("heads", [(1, 1), (3, 1), (6, 2)])
    @pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (9, 1), (17, 6), (6, 33)])
    def test_sizes(self, assert_same, sizes, heads):
        case = Case("everything", *sizes, dim=5, value_dim=2, heads=heads)
        assert_same(edge_attention(*case.nodes, **case.options), case.expected()[:2], case.leaves, 1e-11)

    @pytest.mark.parametrize("form", ["nothing", "edge, bias", "everything", "everything, on all pairs"])
    def test_the_logarithm_of_the_sum(self, assert_same, form):
        case = Case(form)
        actual, expected = edge_attention(*case.nodes, **case.options, return_lse=True), case.expected()
        hears = expected[2].isfinite()
        assert (actual[2] == -math.inf).equal(~hears)
        pairs = [(a, e) for a, e in zip(actual[:2], expected[:2], strict=True) if a is not None]
        pairs.append((actual[2][hears], expected[2][hears]))
        assert_same(*zip(*pairs, strict=True), case.leaves, 1e-11)

    def test_parts_merge(self):
        """Attention over two halves of the senders, merged by their sums, is attention over all."""
        case = Case("edge", receivers=5, senders=8, heads=(2, 2), shared=(None, None))
        query, key, value = case.nodes
        edge = case.options["edge"]
        halves = [
            edge_attention(query, key[:, :, at], value[:, :, at], edge[..., at], return_lse=True)
            for at in (slice(0, 4), slice(4, 8))
        ]
        shares = torch.stack([lse for _, _, lse in halves]).softmax(0)
        merged = sum(share[..., None] * output for share, (output, _, _) in zip(shares, halves, strict=True))
        torch.testing.assert_close(merged, edge_attention(query, key, value, edge)[0], rtol=1e-12, atol=1e-12)

    def test_a_bias_of_minus_infinity_masks(self):
        case = Case("bias off a graph", heads=(2, 2))
        mask = case.options.pop("neighbors").clone()
        mask[..., 0] = True
        bias = case.options["bias"]
        masked = edge_attention(*case.nodes, **case.options | {"bias": bias.masked_fill(~mask, -math.inf)})[0]
        expected = edge_attention(*case.nodes, neighbors=mask, **case.options)[0]
        torch.testing.assert_close(masked, expected, rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(masked.sum(), bias)
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("update", ["neighbors", "all"])
    def test_what_is_off_the_graph_is_not_read(self, update):
        """NaN and infinity in edges, biases, keys, values and sender gates that nobody hears."""
        case = Case("everything", heads=(2, 2), shared=(None, None))
        mask = torch.rand(2, 1, 5, 7) > 0.4
        mask[..., 3] = False  # a sender that nobody hears
        mask[..., 0] = True
        results = []
        for bad in (0.0, math.nan, math.inf):
            query, key, value = (x.detach().clone() for x in case.nodes)
            options = {n: x.detach().clone() if isinstance(x, Tensor) else x for n, x in case.options.items()}
            options |= {"neighbors": mask, "update": update}
            for name in ("edge", "bias"):
                options[name][~mask.expand(2, 2, 5, 7)] = bad
            for tensor in (key, value, options["sender_gate"]):
                tensor[:, :, 3] = bad
            results.append((*edge_attention(query, key, value, **options, return_lse=True), mask))
        for output, new_edge, lse, _ in results[1:]:
            assert output.equal(results[0][0])
            assert lse.equal(results[0][2])
            if update == "neighbors":
                assert new_edge.equal(results[0][1])
            else:
                assert not new_edge[..., 3].isfinite().any()


@pytest.mark.usefixtures("backend")
class TestDropout:
    def test_one_seed_is_one_mask(self):
        case = Case("dropout")
        first, again = (edge_attention(*case.nodes, **case.options)[0] for _ in range(2))
        other = edge_attention(*case.nodes, **case.options | {"seed": 6})[0]
        assert first.equal(again)
        assert not first.equal(other)

    @pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**64 - 1])
    def test_a_seed_in_a_tensor(self, seed):
        case = Case("dropout")
        signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
        one, other = (edge_attention(*case.nodes, **case.options | {"seed": s})[0] for s in (seed, signed))
        assert one.equal(other)

    def test_no_seed_draws_one(self):
        case = Case("dropout", receivers=20, senders=20)
        case.options["seed"] = None
        torch.manual_seed(3)
        first, second = (edge_attention(*case.nodes, **case.options)[0] for _ in range(2))
        torch.manual_seed(3)
        assert not first.equal(second)
        assert edge_attention(*case.nodes, **case.options)[0].equal(first)

    def test_certain_dropout_is_nothing(self):
        case = Case("dropout, bias")
        case.options["dropout"] = 1.0
        output, _ = edge_attention(*case.nodes, **case.options)
        assert not output.any()
        assert all(not g.any() for g in torch.autograd.grad(output.sum(), case.leaves))

    def test_the_share_that_is_dropped(self):
        query = torch.zeros(1, 2, 64, 1)
        key, value = torch.zeros(1, 2, 128, 1), torch.ones(1, 2, 128, 1)
        output, _ = edge_attention(query, key, value, dropout=0.25, seed=1)
        assert abs(float(output.mean()) - 1.0) < 4 * (0.25 / 0.75 / (2 * 64 * 128)) ** 0.5


UNFIT = [
    ({"key": leaf(2, 3, 7, 4)}, r"key: expected a number of heads that divides the 4 of query, got 3"),
    ({"key": leaf(2, 2, 7, 5)}, r"key: expected \[2, 2, 7, 4\], got \[2, 2, 7, 5\]"),
    ({"value": leaf(2, 4, 7, 3)}, r"value: expected \[2, 2, 7, 3\], got \[2, 4, 7, 3\]"),
    ({"value": leaf(2, 2, 6, 3)}, r"value: expected \[2, 2, 7, 3\], got \[2, 2, 6, 3\]"),
    ({"bias": leaf(5, 6)}, r"bias: expected a shape that broadcasts to \[2, 4, 5, 7\], got \[5, 6\]"),
    ({"bias": 1.0}, "bias: expected a tensor, got float"),
    ({"bias": leaf(5, 7) * 1j}, "bias: expected real numbers, got torch.complex128"),
    ({"neighbors": torch.ones(7, 5, dtype=torch.bool)}, "neighbors: expected a shape that broadcasts"),
    ({"gate": leaf(2, 4, 7)}, r"gate: expected \[2, 4, 5\], got \[2, 4, 7\]"),
    ({"sender_gate": leaf(2, 4, 5)}, r"sender_gate: expected \[2, 4, 7\], got \[2, 4, 5\]"),
    ({"sender_gate": 2.0}, "sender_gate: expected a tensor, got float"),
    ({"edge_scale": leaf(2)}, r"edge_scale: expected a scalar, got \[2\]"),
    ({"edge_bias": "1"}, "edge_bias: expected a number, got str"),
    ({"update": "some"}, "update: expected 'neighbors' or 'all', got 'some'"),
    ({"update": ["all"]}, "update: expected 'neighbors' or 'all'"),
    ({"clamp": 1.0}, r"clamp: expected \(low, high\), got 1.0"),
    ({"clamp": (1.0, 0.0)}, r"clamp: expected low <= high, got \(1.0, 0.0\)"),
    ({"clamp": (0.0, math.nan)}, "clamp: expected low <= high"),
    ({"clamp": ("a", 1)}, "clamp: expected a number, got str"),
    ({"dropout": 1.5}, "dropout: expected a probability from 0 to 1, got 1.5"),
    ({"dropout": -0.1}, "dropout: expected a probability from 0 to 1, got -0.1"),
    ({"dropout": math.nan}, "dropout: expected a probability"),
    ({"dropout": "0.1"}, "dropout: expected a number, got str"),
    ({"seed": 2**64}, "seed: expected an int of 64 bits"),
    ({"seed": 0.5}, "seed: expected an int of 64 bits, an int64 tensor or None, got 0.5"),
    ({"seed": torch.ones(())}, r"seed: expected one int64, got \[\] of torch.float32"),
    ({"return_lse": 1}, "return_lse: expected True or False, got 1"),
]


@pytest.mark.parametrize("change, message", UNFIT)
def test_refused_by_name(change, message):
    case = Case("edge")
    arguments = dict(zip(("query", "key", "value"), case.nodes, strict=True)) | case.options
    edge_attention(**arguments)
    with pytest.raises(ValueError, match=f"^edge_attention: {message}") as error:
        edge_attention(**(arguments | change))
    assert "\n" not in str(error.value)


def test_gradients_by_differences():
    """First and second derivatives of everything at once."""
    case = Case("everything", 2, 3, dim=2, value_dim=1, heads=(2, 1))
    case.options["clamp"] = (-9.0, 9.0)  # differences step over the corners of a clamp
    names = [name for name in TENSORS if name in case.options]

    def call(query, key, value, *tensors):
        options = case.options | dict(zip(names, tensors, strict=True))
        return edge_attention(query, key, value, **options, return_lse=True)[:2]

    inputs = (*case.nodes, *(case.options[name] for name in names))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


# As torch sees it ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend", "fresh_compile")
def test_compiled_in_one_piece():
    case, seed = Case("everything, on all pairs"), torch.tensor(5)

    def call(nodes, options, seed):
        return edge_attention(*nodes, **options | {"seed": seed}, return_lse=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results, expected = compiled(case.nodes, case.options, seed), call(case.nodes, case.options, seed)
    assert all(one.equal(other) for one, other in zip(results, expected, strict=True))
    torch.testing.assert_close(
        torch.autograd.grad(results[0].sum() + results[1].sum(), case.leaves),
        torch.autograd.grad(expected[0].sum() + expected[1].sum(), case.leaves),
    )


@pytest.mark.usefixtures("backend")
def test_mapped_over():
    """A bias and a sender gate that members of a mapped batch share, and their gradients."""
    query, key, value = leaf(3, 2, 4, 5, 4), leaf(2, 2, 7, 4), leaf(2, 2, 7, 3)
    bias, gate = leaf(2, 1, 5, 7), leaf(2, 4, 7)

    def call(query, bias, gate):
        return (
            edge_attention(query, key, value, bias=bias, sender_gate=gate, clamp=(-2.0, 2.0))[0]
            .square()
            .sum()
        )

    gradient = torch.func.grad(call, (0, 1, 2))
    mapped = torch.vmap(gradient, (0, None, None))(query, bias, gate)
    for number, one in enumerate(query):
        torch.testing.assert_close([x[number] for x in mapped], list(gradient(one, bias, gate)))


def test_kernels_refuse_dropout_inside_of_torch_func():
    query = leaf(3, 1, 2, 4, 3)

    def call(query, backend):
        return edge_attention(query, query, query, dropout=0.5, seed=1, backend=backend)[0]

    mapped = torch.vmap(lambda query: call(query, None))(query)
    for number, one in enumerate(query):
        torch.testing.assert_close(mapped[number], call(one, None))
    if native.available():
        with pytest.raises(RuntimeError, match="has no dropout inside of torch"):
            torch.vmap(lambda query: call(query, "native"))(query)
