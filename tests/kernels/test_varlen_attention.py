"""Attention inside sequences of different lengths, against torch's own attention on one sequence after the other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental import symbolic_shapes

from ecore_kernels import Sequences, native, use_backend, varlen_attention
from tests.kernels.varlen_problems import draw, given, run

needs_native = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
FORMS = ("three side by side", "keys and values side by side", "three tensors")
# A tile is 72 queries by 320 keys, a panel 6 queries; the sums of keys over queries are cut in parts of 256 queries.
LENGTHS = {
    "short": [3, 1, 5],
    "empty ones among them": [0, 4, 0, 7, 0],
    "all empty": [0, 0],
    "none": [],
    "panels": [5, 6, 7, 12, 13],
    "tiles of queries": [71, 72, 73, 145],
    "tiles of keys": [319, 320, 321],
    "parts": [700, 2, 257],
}
KEY_LENGTHS = {
    "short": ([3, 1, 5], [2, 6, 1]),
    "empty ones among them": ([2, 4, 0, 7], [0, 3, 5, 0]),
    "no keys": ([3, 2], [0, 0]),
    "no queries": ([0, 0], [3, 2]),
    "tiles of queries": ([73, 200], [9, 30]),
    "tiles of keys": ([5, 80], [321, 700]),
    "parts": ([700], [330]),
}
WIDTHS = [(1, 1), (2, 9), (7, 5), (8, 8), (15, 33), (16, 17), (100, 100), (128, 20)]


def expected(
    leaves: Sequence[Tensor],
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Torch's attention on one sequence after the other."""
    if len(leaves) == 1:
        query, key, value = leaves[0].unbind(1)
    elif len(leaves) == 2:
        query, (key, value) = leaves[0], leaves[1].unbind(1)
    else:
        query, key, value = leaves
    heard = [query.new_zeros(0, query.shape[1], value.shape[2])]
    by_keys = [x.split([*(key_lengths if key_lengths is not None else lengths)]) for x in (key, value)]
    for q, k, v in zip(query.split([*lengths]), *by_keys, strict=True):
        if len(k) == 0:
            heard.append(q.new_zeros(len(q), q.shape[1], v.shape[2]))
        elif len(q) > 0:
            here = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, rows, d]
            found = F.scaled_dot_product_attention(*here, is_causal=causal, scale=scale, enable_gqa=True)
            heard.append(found[0].transpose(0, 1))
    return torch.cat(heard)


def gradients(output: Tensor, leaves: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Gradients of the leaves; zeros where torch's own attention has none, for a leaf that nobody hears."""
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(output, list(leaves), upstream.to(output.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.fixture
def uninitialized_is_nan():
    """Memory that an operator allocates holds NaN, so that what it forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same(leaves, found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(wanted)
    pairs = zip(gradients(found, leaves, upstream), gradients(wanted, leaves, upstream), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@backends
@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_of_sequences_to_themselves(backend, lengths, form, causal):
    leaves = draw(form, sum(lengths), sum(lengths))
    found = run(leaves, lengths, causal=causal, backend=backend)
    assert_same(leaves, found, expected(leaves, lengths, causal=causal))


@backends
@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("lengths, key_lengths", KEY_LENGTHS.values(), ids=KEY_LENGTHS)
def test_attention_to_other_sequences(backend, lengths, key_lengths, form):
    leaves = draw(form, sum(lengths), sum(key_lengths))
    found = run(leaves, lengths, key_lengths, scale=0.7, backend=backend)
    assert_same(leaves, found, expected(leaves, lengths, key_lengths, scale=0.7))


@pytest.mark.usefixtures("uninitialized_is_nan")
@backends
@pytest.mark.parametrize("heads, key_heads", [(6, 2), (3, 1), (4, 4)])
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("lengths, key_lengths", [*KEY_LENGTHS.values(), ((300, 5), None)], ids=str)
def test_heads_may_share_keys_and_values(backend, lengths, key_lengths, form, heads, key_heads):
    torch.manual_seed(0)
    keys = sum(lengths if key_lengths is None else key_lengths)
    leaves = draw(form, sum(lengths), keys, heads, key_heads=key_heads)
    causal = key_lengths is None
    assert_same(
        leaves,
        run(leaves, lengths, key_lengths, backend=backend, causal=causal),
        expected(leaves, lengths, key_lengths, causal),
    )


@needs_native
@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim, value_dim", WIDTHS)
def test_widths(dim, value_dim, causal):
    lengths = [7, 80, 1, 330]
    leaves = draw("three tensors", sum(lengths), sum(lengths), 1, dim, value_dim)
    found = run(leaves, lengths, causal=causal, backend="native")
    assert_same(leaves, found, expected(leaves, lengths, causal=causal))


@needs_native
def test_every_short_length():
    """One to three panels of queries, each number of rows in the last: where a causal tile ends."""
    for length in range(1, 20):
        leaves = draw("three side by side", 3 * length + 1, 0, 1, 4)
        lengths = [length, 1, 2 * length]
        found = run(leaves, lengths, causal=True, backend="native")
        assert_same(leaves, found, expected(leaves, lengths, causal=True))


@needs_native
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[40, 0, 9], [73, 321]], ids=str)
def test_float32_is_as_exact_as_torchs(lengths, causal, size):
    """Errors within twice those of torch's attention, also where one key takes all: medians of nine draws."""
    margins: list[list[float]] = []
    for draw_number in range(9):
        torch.manual_seed(draw_number)
        leaves = draw("three tensors", sum(lengths), sum(lengths), 2, 16, 16, torch.float32)
        with torch.no_grad():
            leaves[0] *= size
        exact = [x.detach().double().requires_grad_() for x in leaves]
        outputs = (
            run(leaves, lengths, causal=causal, backend="native"),
            expected(leaves, lengths, causal=causal),
            expected(exact, lengths, causal=causal),
        )
        upstream = torch.randn_like(outputs[0])
        results = [
            (y.detach(), *gradients(y, of, upstream))
            for y, of in zip(outputs, (leaves, leaves, exact), strict=True)
        ]
        margins.append(
            [
                float(2 * (torchs - right).norm() + 1e-7 * right.norm() - (ours - right).norm())
                for ours, torchs, right in zip(*results, strict=True)
            ]
        )
    for of_tensor in zip(*margins, strict=True):
        assert statistics.median(of_tensor) >= 0.0


@backends
def test_views_of_a_wider_projection(backend):
    """Columns of a wider result, heads before rows, every other element of a row, and a shared row."""
    lengths = [4, 0, 80]
    rows = sum(lengths)
    wide = torch.randn(rows, 5, 2, 6, dtype=torch.float64, requires_grad=True)
    for columns in (slice(1, 4), slice(0, 5, 2)):
        leaves = [wide[:, columns]]
        found = run(leaves, lengths, causal=True, backend=backend)
        wanted = expected(leaves, lengths, causal=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        sent = torch.randn_like(found)
        got, right = (torch.autograd.grad(y, wide, sent, retain_graph=True)[0] for y in (found, wanted))
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    by_head = torch.randn(2, rows, 6, dtype=torch.float64, requires_grad=True)
    strided = torch.randn(rows, 2, 12, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(1, 1, 6, dtype=torch.float64, requires_grad=True)
    views = [by_head.transpose(0, 1), strided[:, :, ::2], shared.expand(rows, 2, 6)]
    for leaves in (views, views[::-1], [views[0], views[0], views[0]]):
        found, wanted = run(leaves, lengths, backend=backend), expected(leaves, lengths)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        sent = torch.randn_like(found)
        roots = (by_head, strided, shared)
        pairs = zip(gradients(found, roots, sent), gradients(wanted, roots, sent), strict=True)
        for got, right in pairs:
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


@backends
def test_upstream_gradients_of_any_strides(backend):
    """Those of a sum have stride 0, those of a transposed product another order."""
    lengths = [6, 75]
    leaves = draw("three side by side", 81, 81)
    for weigh in (
        lambda y: y.sum(),
        lambda y: (y.transpose(0, 2) * torch.arange(5.0)[:, None, None]).sum(),
    ):
        found, wanted = (
            torch.autograd.grad(weigh(y), leaves)
            for y in (run(leaves, lengths, backend=backend), expected(leaves, lengths))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@needs_native
@pytest.mark.parametrize("lengths", [[5, 9], [300, 4]], ids=str)
def test_each_gradient_alone_has_its_bits(lengths):
    leaves = draw("three tensors", sum(lengths), sum(lengths))
    output = run(leaves, lengths, causal=True, backend="native").square().sum()
    every = torch.autograd.grad(output, leaves, retain_graph=True)
    for leaf, right in zip(leaves, every, strict=True):
        (alone,) = torch.autograd.grad(output, leaf, retain_graph=True)
        assert torch.equal(alone, right)


@backends
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(backend, causal):
    for form in FORMS:
        leaves = draw(form, 5, 5, 1, 2, 2)

        def call(*leaves):
            return run(leaves, [2, 0, 3], causal=causal, backend=backend)

        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


@backends
def test_gradcheck_of_other_sequences(backend):
    leaves = draw("three tensors", 4, 5, 1, 2, 3)

    def call(*leaves):
        return run(leaves, [2, 2, 0], [3, 0, 2], backend=backend)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_registered_operators(form):
    tensors = [x.detach() for x in draw(form, 9, 9)]
    offsets = torch.tensor([0, 4, 4, 9])
    other = None if form == FORMS[0] else torch.tensor([0, 2, 8, 9])
    inputs, ops = (*given(tensors), offsets, other), torch.ops.ecore_kernels
    causal = other is None
    torch.library.opcheck(ops.fused_varlen_attention, (*inputs, causal, 0.5, "native"))
    output, statistics = ops.fused_varlen_attention(*inputs, causal, 0.5, "native")
    for needs in ([True] * 3, [True, False, False]):
        arguments = (torch.ones_like(output), *inputs, output, statistics, causal, 0.5, needs, "native")
        torch.library.opcheck(ops.fused_varlen_attention_backward, arguments)


@backends
@pytest.mark.usefixtures("fresh_compile")
def test_compiled_without_a_break(backend):
    """For sequences of other numbers and lengths, too."""

    def step(rows, sequences):
        heard = varlen_attention(torch.tanh(rows), None, None, sequences, causal=True, backend=backend)
        return heard.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([4, 5], [3, 0, 80], [2, 6]):
        sequences = Sequences.from_lengths(lengths)
        leaves = draw("three side by side", sum(lengths), 0)
        found, wanted = (f(*leaves, sequences) for f in (compiled, step))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves))


@pytest.mark.skipif(
    not hasattr(symbolic_shapes, "has_static_value"), reason="torch 2.7 compiles anew for every number"
)
@backends
@pytest.mark.usefixtures("fresh_compile")
def test_scales_do_not_compile_anew(backend):
    """Once for the first number, once for any."""
    sequences = Sequences.from_lengths([4, 5])

    def step(rows, scale):
        return varlen_attention(torch.tanh(rows), None, None, sequences, scale=scale, backend=backend)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    leaves, frames = draw("three side by side", 9, 0), []
    for scale in (0.1, 0.2, 0.3, 0.5, 0.7):
        found, wanted = (f(*leaves, scale) for f in (compiled, step))
        torch.testing.assert_close(found, wanted)
        upstream = torch.ones_like(found)
        torch.testing.assert_close(*(torch.autograd.grad(x, leaves, upstream) for x in (found, wanted)))
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1]


def test_an_exported_program():
    sequences = Sequences.from_lengths([3, 0, 6])

    class Layer(torch.nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return varlen_attention(rows, None, None, sequences, causal=True)

    rows = torch.randn(9, 3, 2, 4)
    with use_backend("reference"):
        program = torch.export.export(Layer(), (rows,))
    assert not any("ecore_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(rows), Layer()(rows))


@backends
def test_function_transforms(backend):
    lengths = [3, 0, 4]
    many = torch.randn(3, 7, 3, 2, 4, dtype=torch.float64)

    def loss(rows):
        return run([rows], lengths, causal=True, backend=backend).square().sum()

    torch.testing.assert_close(torch.func.vmap(loss)(many), torch.stack([loss(x) for x in many]))
    gradient = torch.func.grad(loss)
    torch.testing.assert_close(torch.func.vmap(gradient)(many), torch.stack([gradient(x) for x in many]))
    if backend == "reference":
        _, tangent = torch.func.jvp(loss, (many[0],), (many[1],))
        torch.testing.assert_close(tangent, (gradient(many[0]) * many[1]).sum())
    else:
        with pytest.raises(RuntimeError, match="it has no forward-mode derivative"):
            torch.func.jvp(loss, (many[0],), (many[1],))


@backends
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision(backend, half):
    """Products and sums are in float32, results and gradients in the type of the tensors."""
    leaves, lengths = draw("three side by side", 80, 0, dtype=half), [75, 5]
    wide = [x.detach().float().requires_grad_() for x in leaves]
    found, wanted = (run(x, lengths, causal=True, backend=backend) for x in (leaves, wide))
    assert found.dtype is half
    torch.testing.assert_close(found, wanted.to(half), rtol=0, atol=0)
    upstream = torch.randn_like(found)
    got, right = (torch.autograd.grad(y, x, upstream.to(y)) for y, x in ((found, leaves), (wanted, wide)))
    assert got[0].dtype is half
    torch.testing.assert_close(got[0].float(), right[0], rtol=0.02, atol=0.02)
    mixed = [leaves[0][:, 0], wide[0][:, 1], leaves[0][:, 2]]
    assert run(mixed, lengths, backend=backend).dtype is torch.float32


@backends
def test_autocast_takes_float32_on_a_cpu(backend):
    leaves = [x.detach() for x in draw("three side by side", 9, 0, dtype=torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        found = run(leaves, [4, 5], backend=backend)
        wide = run([leaves[0].double()], [4, 5], backend=backend)
    assert (found.dtype, wide.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(found, run([leaves[0].float()], [4, 5], backend=backend))


@backends
def test_longest_may_be_too_large(backend):
    leaves, lengths = draw("three side by side", 9, 0), [4, 5]
    right = run(leaves, lengths, causal=True, backend=backend)
    generous = Sequences(torch.tensor([0, 4, 9]), 9, 12)
    found = varlen_attention(*given(leaves), generous, causal=True, backend=backend)
    torch.testing.assert_close(found, right)


@backends
def test_sizes_of_zero(backend):
    sequences = Sequences.from_lengths([2, 3])
    rows = torch.randn(5, 3, 2, 4, requires_grad=True)
    query, key, value = rows.unbind(1)
    output = varlen_attention(query, key, value[:, :, :0], sequences, backend=backend)
    assert output.shape == (5, 2, 0)
    assert not torch.autograd.grad(output.sum(), rows)[0].any()
    output = varlen_attention(rows[:, :, :0], None, None, sequences, backend=backend)
    assert output.shape == (5, 0, 4)
    assert not torch.autograd.grad(output.sum(), rows)[0].any()
