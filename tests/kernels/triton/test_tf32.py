"""Products in tf32: every operand is rounded to nearest, where the tensor cores would cut it.

In the interpreter, products cut their operands here as tensor cores do. So the kernels' results must be those of a
float64 computation whose products take rounded operands, up to float32's errors: a hundredth of rounding's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ecore_kernels import EdgeUpdate, EmotionGraph, edge_attention, edge_readout, graph_attention
from ecore_kernels.operators.history import row_factor

pytest.importorskip("triton", reason="the kernels are written in it")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.tiles import rounded

# A power of two: the kernels round gradients of scores before they multiply by it, the emulation afterwards.
SCALE = 0.25
SENDERS = 39
# Float32's error moves a few intermediate results in ten thousand across a tie, each of which then differs by 1e-3.
# So a fifth of the elements may have a larger error than float32's, and the norm of all errors may be TIES. An operand
# that is cut, or left as it is, moves every element by some 2e-4.
FLOAT32, TIES = 1e-5, 1e-4


def cutting(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's product with operands of which it sees 10 bits of mantissa, as tensor cores do."""

    def cut(operand: Any) -> Any:
        assert operand.data.dtype == np.float32
        bits = np.ascontiguousarray(operand.data).view(np.int32) & ~0x1FFF
        return dataclasses.replace(operand, data=bits.view(np.float32))

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, cut(a), cut(b), *rest)

    return product


@pytest.fixture(autouse=True)
def _tf32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(InterpreterBuilder, "create_dot", cutting(InterpreterBuilder.create_dot))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


# Rounding itself ------------------------------------------------------------------------------------------------


@triton.jit
def _round(given, result, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(result + place, rounded(tl.load(given + place), PRECISION))


def through_kernel(values: Tensor, precision: str) -> Tensor:
    result = torch.empty_like(values)
    _round[(1,)](values, result, SIZE=len(values), PRECISION=precision)
    return result


def to_tf32(x: Tensor) -> Tensor:
    """Round to 11 significant bits, ties away from zero, by arithmetic on the mantissa; not for denormals."""
    mantissa, exponent = x.detach().double().frexp()
    nearest = mantissa.sign() * (mantissa.abs() * 2**11 + 0.5).floor() / 2**11
    return nearest.ldexp(exponent).to(x.dtype)


ROUNDED = {
    0x00000000: 0x00000000,
    0x00000FFF: 0x00000000,  # denormals
    0x00001000: 0x00002000,
    0x007FF000: 0x00800000,  # to the smallest normal number
    0x3F800000: 0x3F800000,
    0x3F800FFF: 0x3F800000,
    0x3F801000: 0x3F802000,  # ties: away from zero, whether the other neighbour is even
    0x3F803000: 0x3F804000,  # or odd
    0x3F801001: 0x3F802000,
    0x3FFFF000: 0x40000000,  # to the next power of two
    0x7F7FEFFF: 0x7F7FE000,  # the largest that stays finite
    0x7F7FF000: 0x7F800000,
    0x7F7FFFFF: 0x7F800000,
    0x7F800000: 0x7F800000,  # infinity
}


def test_rounding_to_nearest(device):
    bits = [*ROUNDED, *(b | 0x80000000 for b in ROUNDED)]
    expected = [*ROUNDED.values(), *(b | 0x80000000 for b in ROUNDED.values())]
    bits, expected = (
        torch.tensor(x + [0] * (32 - len(x)), dtype=torch.int64).to(torch.int32) for x in (bits, expected)
    )
    result = through_kernel(bits.to(device).view(torch.float32), "tf32").cpu()
    assert result.view(torch.int32).tolist() == expected.tolist()
    values = torch.randn(1024) * torch.logspace(-30, 30, 1024)
    torch.testing.assert_close(
        through_kernel(values.to(device), "tf32").cpu(), to_tf32(values), rtol=0, atol=0
    )


@pytest.mark.parametrize("sign", [0, 0x80000000])
def test_nan_stays_nan(device, sign):
    """A carry would turn CUDA's own NaN, 0x7FFFFFFF, into -0; without its low bits another would be infinity."""
    payloads = [
        0x7FFFFFFF,
        0x7FC00000,
        0x7F800001,
        0x7F800FFF,
        0x7F801000,
        0x7FBFFFFF,
        0x7FFFF000,
        0x7F802000,
    ]
    bits = torch.tensor([sign | payload for payload in payloads]).to(torch.int32)
    assert through_kernel(bits.to(device).view(torch.float32), "tf32").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_other_arithmetic_is_left_alone(device, dtype):
    values = torch.randn(256, dtype=torch.float64).to(dtype)
    result = through_kernel(values.to(device), launch.dot_precision(launch.arithmetic_of(dtype, "ieee")))
    assert torch.equal(result.cpu(), values)
    # What torch asks for counts for float32 alone.
    assert (launch.dot_precision(launch.arithmetic_of(dtype, "tf32")) == "tf32") == (dtype is torch.float32)


# The operators ----------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """a b^T of rounded operands. The products of its backward round theirs too."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(to_tf32(a), to_tf32(b))
        return to_tf32(a) @ to_tf32(b).mT

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return to_tf32(grad) @ b, to_tf32(grad).mT @ a


class _Attention(torch.autograd.Function):
    """Softmax of scores times values, with the products of an online softmax that sees all senders at once.

    The forward rounds weights before they are normalized, the backward after. The backward's delta comes from
    ``output``, the kernel's own.
    """

    @staticmethod
    def forward(ctx, scores, value, heard, output):
        scores = scores.masked_fill(~heard, float("-inf"))
        lonely = ~heard.any(-1, keepdim=True)
        weight = (scores - scores.amax(-1, keepdim=True).masked_fill(lonely, 0.0)).exp()
        total = weight.sum(-1, keepdim=True).masked_fill(lonely, 1.0)
        ctx.save_for_backward(weight / total, to_tf32(value), output)
        return to_tf32(weight) @ to_tf32(value) / total

    @staticmethod
    def backward(ctx, grad):
        attention, value, output = ctx.saved_tensors
        grad = to_tf32(grad)
        delta = (grad * output).sum(-1, keepdim=True)
        return attention * (grad @ value.mT - delta), to_tf32(attention).mT @ grad, None, None


def emulated_edges(graph: EmotionGraph, history: Sequence[EdgeUpdate]) -> tuple[Tensor, Tensor]:
    """The last edges [B, K, N, N] from rounded products, and neighbours."""
    edge, neighbors = graph.dense()
    for update in history:
        edge = edge * (1.0 + SCALE * _Product.apply(update.query, update.key))
    factor = row_factor(history)
    return edge if factor is None else edge * factor[..., None], neighbors


def widened(tensor: Tensor) -> Tensor:
    """A copy on the CPU, a leaf; floats in float64."""
    number = tensor.double() if tensor.is_floating_point() else tensor
    return number.detach().cpu().requires_grad_(tensor.requires_grad)


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, a leaf."""
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def converted(graph: EmotionGraph, form: Callable[[Tensor], Tensor]) -> EmotionGraph:
    """The graph with ``form`` applied to all its tensors."""
    fields = graph.word_weight, graph.word_mask, graph.emotion_weight, graph.correlation, graph.emotion_mask
    return EmotionGraph(*(x if x is None else form(x) for x in fields))


def sizes(leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Norms to measure errors of gradients by; of an edge scale that of its terms, one a gate, which may cancel."""
    found = []
    for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        if not leaf.dim():  # it stands behind its gate
            gradient = leaves[number - 1] * gradients[number - 1] / leaf
        found.append(gradient.detach().norm())
    return found


def assert_products_of_rounded_operands(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    leaves: Sequence[Tensor],
    exact_leaves: Sequence[Tensor],
) -> None:
    """Assert that outputs and all leaves' gradients are those of the float64 computation with rounded operands."""
    upstream = [torch.randn(x.shape) for x in actual]
    gradients = torch.autograd.grad(actual, leaves, [u.to(actual[0].device) for u in upstream])
    exact = torch.autograd.grad(expected, exact_leaves, [u.double() for u in upstream])
    norms = [*(x.detach().norm() for x in expected), *sizes(exact_leaves, exact)]
    for got, wanted, norm in zip([*actual, *gradients], [*expected, *exact], norms, strict=True):
        got, wanted = got.detach().cpu().double(), wanted.detach()
        assert norm > 0
        errors = (got - wanted).abs() / (
            norm / wanted.count_nonzero().clamp(min=1).sqrt()
        )  # of an element's mean size
        assert (got - wanted).norm() <= TIES * norm
        assert errors[wanted != 0].quantile(0.8) <= FLOAT32


@pytest.fixture
def constants(monkeypatch) -> dict[str, dict[str, Any]]:
    """Launch constants of a direction's kernels in place of the table's.

    The forward gets all senders in one step: what its softmax rounds depends on the maximum so far.
    """
    original = launch.configuration
    changes: dict[str, dict[str, Any]] = {"forward": {"STEP": 64}, "backward": {}}

    def configuration(kernel, *arguments):
        chosen, options = original(kernel, *arguments)
        changed = changes[kernel.rpartition("_")[2]]
        return chosen | {name: value for name, value in changed.items() if name in chosen}, options

    monkeypatch.setattr(launch, "configuration", configuration)
    return changes


def inputs(make, device, depth, dim=20):
    """A graph and layers, on the device in float32 and on the CPU in float64; all leaves ask for gradients."""
    graph = make.graph(
        1, 30, SENDERS - 30, 2, dtype=torch.float32, correlation="batched" if depth % 2 else "shared"
    )
    graph.word_mask[0, 0] = torch.rand(30) > 0.2
    updates = [make.update(graph, dim, dtype=torch.float32) for _ in range(depth)]
    here = converted(graph, functools.partial(placed, device=device))
    exact = converted(graph, widened)
    return (
        (here, [EdgeUpdate(*(placed(x, device) for x in update)) for update in updates]),
        (exact, [EdgeUpdate(*map(widened, update)) for update in updates]),
    )


def leaves_of(graph: EmotionGraph, updates: Sequence[EdgeUpdate]) -> list[Tensor]:
    return [graph.emotion_weight, graph.correlation, *(x for update in updates for x in update)]


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize("receivers", ["all", "words"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_graph_attention(make, device, depth, receivers):
    (graph, history), (exact_graph, exact_history) = inputs(make, device, depth)
    lead = (1, 2, SENDERS)
    nodes = [torch.randn(*lead, width, requires_grad=True) for width in (20, 20, 12)]
    here, exact = [placed(x, device) for x in nodes], list(map(widened, nodes))
    output = graph_attention(*here, graph, history, scale=SCALE, receivers=receivers, backend="triton")

    edge, neighbors = emulated_edges(exact_graph, exact_history)
    query, key, value = exact
    rows = slice(30 if receivers == "words" else None)
    scores = (SCALE * _Product.apply(query, key) * edge)[:, :, rows]
    expected = _Attention.apply(scores, value, neighbors[:, :, rows], output.detach().double().cpu())
    leaves, exact_leaves = leaves_of(graph, history), leaves_of(exact_graph, exact_history)
    if receivers == "words":  # nobody else hears by the correlation
        del leaves[1], exact_leaves[1]
    assert_products_of_rounded_operands([output], [expected], [*here, *leaves], [*exact, *exact_leaves])


@pytest.mark.parametrize(
    "updated, shared, reload",
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
)
def test_edge_attention(device, constants, updated, shared, reload):
    constants["backward"]["RELOAD"] = reload
    lead = (1, 2, SENDERS)
    nodes = [torch.randn(*lead, width, requires_grad=True) for width in (20, 20, 12)]
    edge = torch.randn(*((1, 1) if shared else lead[:2]), SENDERS, SENDERS, requires_grad=True)
    update = [torch.randn(lead, requires_grad=True), torch.randn((), requires_grad=True)] if updated else []
    neighbors = torch.rand(*lead, SENDERS) > 0.3
    given = [*nodes, edge, *update]
    here, exact = [placed(x, device) for x in given], list(map(widened, given))
    output, new_edge = edge_attention(
        *here[:4], neighbors.to(device), **dict(zip(("gate", "edge_scale"), here[4:], strict=False)),
        scale=SCALE, backend="triton",
    )  # fmt: skip

    query, key, value, edge, *update = exact
    scores = SCALE * _Product.apply(query, key) * edge
    expected = [_Attention.apply(scores, value, neighbors, output.detach().double().cpu())]
    if updated:
        gate, edge_scale = update
        expected.append((gate[..., None] * edge_scale * (edge + scores)).masked_fill(~neighbors, 0.0))
    assert_products_of_rounded_operands([output, new_edge][: len(expected)], expected, here, exact)


@pytest.mark.parametrize("per_word", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_edge_readout(make, device, depth, per_word):
    (graph, history), (exact_graph, exact_history) = inputs(make, device, depth)
    results = edge_readout(graph, history, scale=SCALE, per_word=per_word, backend="triton")
    edge, neighbors = emulated_edges(exact_graph, exact_history)
    columns = edge.masked_fill(~neighbors, 0.0)[..., 30:].sum(1)
    expected = [columns[:, :30] if per_word else columns[:, :30].sum(1), columns[:, 30:]]
    assert_products_of_rounded_operands(
        results, expected, leaves_of(graph, history), leaves_of(exact_graph, exact_history)
    )


# Against plain PyTorch ----------------------------------------------------------------------------------------------


def plain(graph: EmotionGraph, updates: Sequence[EdgeUpdate], value: Tensor, scale: float) -> Tensor:
    """The layers in plain PyTorch and float32, with products of rounded operands as cuBLAS computes them in tf32."""
    edge, neighbors = graph.dense()
    for query, key, gate, edge_scale in updates:
        weighted = scale * _Product.apply(query, key) * edge
        attention = weighted.masked_fill(~neighbors, -1e4).softmax(-1).masked_fill(~neighbors, 0.0)
        output = _Product.apply(attention, value.mT)
        edge = (gate[..., None] * edge_scale * (edge + weighted)).masked_fill(~neighbors, 0.0)
    return output


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_error_is_within_twice_plain_pytorchs(make, device, layers):
    """Errors of the kernels against those of the plain layers, whose products round their operands as cuBLAS does."""
    (graph, updates), (exact_graph, exact_updates) = inputs(make, device, layers, 100)
    values = torch.randn(1, 2, SENDERS, 100, requires_grad=True)
    value, exact_value = placed(values, device), widened(values)
    upstream = torch.randn(values.shape)

    def attend(graph, updates, value, backend):
        *past, last = updates
        return graph_attention(last.query, last.key, value, graph, past, scale=0.1, backend=backend)

    def with_gradients(output, graph, updates, value):
        *past, last = updates
        leaves = [last.query, last.key, value, *leaves_of(graph, past)]
        given = upstream.to(output.device, output.dtype)
        return leaves, [output.detach(), *torch.autograd.grad(output, leaves, given)]

    exact = exact_graph, exact_updates, exact_value
    leaves, right = with_gradients(attend(*exact, "reference"), *exact)
    _, ours = with_gradients(attend(graph, updates, value, "triton"), graph, updates, value)
    _, theirs = with_gradients(plain(graph, updates, value, 0.1), graph, updates, value)
    norms = [right[0].norm(), *sizes(leaves, right[1:])]
    for one, other, wanted, norm in zip(ours, theirs, right, norms, strict=True):
        error, allowed = ((x.cpu().double() - wanted).norm() for x in (one, other))
        assert error <= 2 * allowed + 1e-3 * norm
