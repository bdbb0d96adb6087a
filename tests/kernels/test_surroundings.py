"""Every operator where something else takes part in a call.

Batches of gradients, torch.jit.trace, negated views, and torch.compile of calls that give one tensor twice.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ecore_kernels import (
    EdgeList,
    EdgeUpdate,
    EmotionGraph,
    QuantizedLinear,
    Sequences,
    dropout_add_layer_norm,
    edge_attention,
    edge_readout,
    graph_attention,
    linear_cross_entropy,
    native,
    otsu,
    quantized_linear,
    quantized_linear_argmax,
    sparse_attention,
    varlen_attention,
)

EDGES = EdgeList.from_edge_index(torch.tensor([[0, 1, 2, 2, 0], [1, 0, 0, 1, 1]]), 3)
SEQUENCES = Sequences.from_lengths([3, 0, 2])
TARGET = torch.tensor([1, 0, 4, 2, -100])
WORDS = torch.tensor([[[True, True, False], [True, False, True]]])  # [B, K, M]


def on_graph(emotion_weight: Tensor, correlation: Tensor) -> EmotionGraph:
    return EmotionGraph(emotion_weight.new_ones(1, 3), WORDS, emotion_weight, correlation)


# By name: a function of tensors that gives results with gradients, and the shapes of the tensors.
OPERATORS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "edge_attention": (
        lambda q, k, v, edge, gate: edge_attention(q, k, v, edge, gate=gate, edge_scale=0.5, return_lse=True),
        [(1, 2, 5, 4)] * 3 + [(5, 5), (1, 2, 5)],
    ),
    "edge_attention, dropout": (
        lambda q, k, v: edge_attention(q, k, v, dropout=0.4, seed=3)[:1],
        [(2, 2, 5, 4)] * 3,
    ),
    "edge_attention, edge_bias": (
        lambda q, edge_bias: edge_attention(q, q, q, edge_bias=edge_bias, clamp=(-1.0, 1.0)),
        [(1, 2, 5, 4), ()],
    ),
    "graph_attention": (
        lambda q, k, v, weight, correlation: graph_attention(
            q, k, v, on_graph(weight, correlation), [EdgeUpdate(k, q)]
        ),
        [(1, 2, 7, 4)] * 3 + [(1, 4), (4, 4)],
    ),
    "edge_readout": (
        lambda q, k, gate, weight, correlation: edge_readout(
            on_graph(weight, correlation), [EdgeUpdate(q, k, gate, 0.5)]
        ),
        [(1, 2, 7, 4)] * 2 + [(1, 2, 7), (1, 4), (4, 4)],
    ),
    "sparse_attention": (
        lambda q, k, v, edge, offset: sparse_attention(q, k, v, EDGES, edge=edge, key_offset=offset),
        [(3, 2, 4)] * 3 + [(5,), (5, 1, 4)],
    ),
    "varlen_attention": (
        lambda q, k, v: varlen_attention(q, k, v, SEQUENCES, causal=True),
        [(5, 2, 4), (5, 1, 4), (5, 1, 3)],
    ),
    "linear_cross_entropy": (
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, bias, TARGET)[0],
        [(5, 4), (6, 4), (6,)],
    ),
    "dropout_add_layer_norm": (
        lambda x, residual, weight, bias: dropout_add_layer_norm(x, residual, weight, bias, 0.3, seed=4),
        [(3, 8)] * 2 + [(8,)] * 2,
    ),
}
every = pytest.mark.parametrize("name", OPERATORS)


def results(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    found = function(*tensors)
    return tuple(x for x in (found if isinstance(found, tuple) else (found,)) if x is not None)


def drawn(shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@every
@pytest.mark.parametrize("create_graph", [False, True])
def test_batches_of_gradients(name, create_graph):
    """``torch.autograd.grad`` under torch.vmap, and its own ``is_grads_batched``, give what a loop gives."""
    function, shapes = OPERATORS[name]
    tensors = tuple(x.requires_grad_() for x in drawn(shapes))
    made = results(function, *tensors)
    upstream = drawn([(3, *x.shape) for x in made])

    def pull(*gradients, **options):
        return torch.autograd.grad(
            made, tensors, gradients, retain_graph=True, create_graph=create_graph, materialize_grads=True, **options
        )  # fmt: skip

    loop = [pull(*(x[i] for x in upstream)) for i in range(3)]
    expected = [torch.stack(of) for of in zip(*loop, strict=True)]
    for batches in (torch.vmap(pull)(*upstream), pull(*upstream, is_grads_batched=True)):
        for batch, of in zip(batches, expected, strict=True):
            torch.testing.assert_close(batch, of)


@every
def test_vectorized_jacobians(name):
    function, shapes = OPERATORS[name]
    tensors, of = drawn(shapes), functools.partial(results, function)
    pairs = zip(
        torch.autograd.functional.jacobian(of, tensors, vectorize=True),
        torch.autograd.functional.jacobian(of, tensors),
        strict=True,
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)


def check_trace(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch calls it deprecated
        traced = torch.jit.trace(function, tensors, check_trace=False)
    others = tuple(-0.5 * x.detach() for x in tensors)
    torch.testing.assert_close(traced(*others), function(*others))


@every
@pytest.mark.parametrize("wanted", [False, True])
def test_traced_by_jit(name, wanted):
    """A trace holds the operator, not what it computed from the example, nor memory without content."""
    function, shapes = OPERATORS[name]
    tensors = tuple(x.requires_grad_(wanted) for x in drawn(shapes))
    check_trace(lambda *tensors: results(function, *tensors), tensors)


def test_inference_traced_by_jit():
    x = drawn([(3, 4)])[0].float()
    layer = QuantizedLinear.of(drawn([(6, 4)])[0])
    check_trace(lambda x: tuple(otsu(x)), (x,))
    check_trace(lambda x: quantized_linear(x, layer), (x,))
    check_trace(lambda x: quantized_linear_argmax(x, layer), (x,))


def negated(x: Tensor) -> Tensor:
    """Return ``x`` as a view of memory that holds -x, as ``torch.conj(z).imag`` is one."""
    return torch._neg_view(-x)


@every
@pytest.mark.parametrize("wanted", [False, True])
def test_negated_views(name, wanted):
    function, shapes = OPERATORS[name]
    tensors = drawn(shapes)
    views = tuple(negated(x) for x in tensors)
    assert all(x.is_neg() for x in views)
    if not wanted:
        results(function, *tensors)  # the same shapes and strides: a plan that must not be taken
        torch.testing.assert_close(results(function, *views), results(function, *tensors))
        return
    found = []
    for given in (views, tensors):
        leaves = tuple(x.requires_grad_() for x in given)
        made = results(function, *leaves)
        upstream = [torch.ones_like(x) for x in made]
        upstream = [negated(x) for x in upstream] if given is views else upstream
        found.append(torch.autograd.grad(made, leaves, upstream))
    torch.testing.assert_close(*found)


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_negated_views_without_gradients_of_few_bits():
    x = drawn([(3, 4)])[0].float()
    layer = QuantizedLinear.of(drawn([(6, 4)])[0])
    assert torch.equal(quantized_linear(negated(x), layer), quantized_linear(x, layer))
    assert torch.equal(quantized_linear_argmax(negated(x), layer)[0], quantized_linear_argmax(x, layer)[0])
    assert torch.equal(otsu(negated(x)).mask, otsu(x).mask)


# By what is given twice: a function, and the shapes of its tensors.
TWICE: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "edge and bias, both gates": (
        lambda q, edge, gate: edge_attention(q, q, q, edge, bias=edge, gate=gate, sender_gate=gate),
        [(1, 2, 5, 4), (1, 2, 5, 5), (1, 2, 5)],
    ),
    "edge scale and bias": (
        lambda q, number: edge_attention(q, q, q, edge_scale=number, edge_bias=number, scale=number),
        [(1, 2, 5, 4), ()],
    ),
    "an update": (
        lambda q, gate, weight, correlation: (
            graph_attention(q, q, q, on_graph(weight, correlation), [EdgeUpdate(q, q, gate, 0.5)] * 2),
            *edge_readout(on_graph(weight, correlation), [EdgeUpdate(q, q, gate, 0.5)] * 2),
        ),
        [(1, 2, 7, 4), (1, 2, 7), (1, 4), (4, 4)],
    ),
    "edge and bias of an edge list, its vectors": (
        lambda q, edge, x: sparse_attention(
            q, q, q, EDGES, edge=edge, bias=edge, key_scale=x, key_offset=x, value_offset=x
        ),
        [(3, 2, 4), (5, 2), (5, 2, 4)],
    ),
    "rows of a sequence": (lambda q: varlen_attention(q, q, q, SEQUENCES), [(5, 2, 4)]),
    "hidden and weight": (lambda x: linear_cross_entropy(x, x, None, TARGET)[0], [(5, 4)]),
    "x and residual, weight and bias": (
        lambda x, weight: dropout_add_layer_norm(x, x, weight, weight, 0.3, seed=4),
        [(3, 8), (8,)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_compile_takes_a_tensor_twice(name, fresh_compile):
    if name == "rows of a sequence" and torch.__version__ < "2.8":
        pytest.skip("torch 2.7 decomposes its own attention into a view that is none")
    function, shapes = TWICE[name]
    tensors = tuple(x.requires_grad_() for x in drawn(shapes))
    found = []
    for of in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        made = results(of, *tensors)
        found.append((made, torch.autograd.grad([x.square().sum() for x in made], tensors)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("seed", [5, 2**63 + 5])
def test_seeds_of_numpy(seed):
    """Its integers have fewer bits than the arithmetic with a seed needs."""
    (x,) = drawn([(1, 2, 5, 4)])
    for of in (
        lambda seed: edge_attention(x, x, x, dropout=0.5, seed=seed)[0],
        lambda seed: dropout_add_layer_norm(x, x, None, None, 0.5, seed=seed)[1],
    ):
        assert torch.equal(of(np.uint64(seed)), of(seed))


def test_sparse_heads_without_elements():
    """Their scores are 0, so that all edges of a receiver count the same."""
    empty, value = torch.zeros(3, 2, 0), torch.randn(3, 2, 4)
    mean = torch.stack([(value[1] + value[2]) / 2, (value[0] + value[2] + value[0]) / 3, torch.zeros(2, 4)])
    torch.testing.assert_close(sparse_attention(empty, empty, value, EDGES, scale=None), mean)


@every
def test_compiled_autograd(name, fresh_compile):
    """A backward of calls that are not compiled, in one graph."""
    function, shapes = OPERATORS[name]
    tensors = tuple(x.requires_grad_() for x in drawn(shapes))

    def loss() -> Tensor:
        return sum((x.square().sum() for x in results(function, *tensors)), torch.zeros(()))

    expected = torch.autograd.grad(loss(), tensors)
    of_compiled = loss()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        of_compiled.backward()
    for tensor, gradient in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
