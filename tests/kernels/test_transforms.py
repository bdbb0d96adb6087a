"""Gradients by finite differences, opcheck, torch.func and torch.compile, for every operator."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from ecore_kernels import (
    EdgeUpdate,
    EmotionGraph,
    edge_attention,
    edge_readout,
    graph_attention,
    otsu,
    use_backend,
)

SCALE = 0.5


class Problem:
    """Each operator as a function of flat tensors, as gradcheck, torch.func and the like want them."""

    def __init__(self, make, layers=2, dim=2, **options):
        self.graph = make.graph(2, 3, 2, 2, **options)
        self.history = [make.update(self.graph, dim, gated=layer != 1) for layer in range(layers)]
        update = make.update(self.graph, dim)
        self.nodes = [update.query, update.key, make.value(self.graph, 3)]
        self.edges = [self.graph.emotion_weight, self.graph.correlation]
        self.past = [x for update in self.history for x in update if x is not None]

    def _rebuilt(self, emotion_weight, correlation, past):
        past = iter(past)
        history = [
            EdgeUpdate(*(None if x is None else next(past) for x in update)) for update in self.history
        ]
        graph = self.graph
        return (
            EmotionGraph(graph.word_weight, graph.word_mask, emotion_weight, correlation, graph.emotion_mask),
            history,
        )

    def attention(self, query, key, value, emotion_weight, correlation, *past):
        return graph_attention(
            query, key, value, *self._rebuilt(emotion_weight, correlation, past), scale=SCALE
        )

    def words(self, query, key, value, emotion_weight, correlation, *past):
        graph, history = self._rebuilt(emotion_weight, correlation, past)
        return graph_attention(query, key, value, graph, history, scale=SCALE, receivers="words")

    def readout(self, emotion_weight, correlation, *past):
        return edge_readout(*self._rebuilt(emotion_weight, correlation, past), scale=SCALE)

    def per_word(self, emotion_weight, correlation, *past):
        return edge_readout(*self._rebuilt(emotion_weight, correlation, past), scale=SCALE, per_word=True)

    def dense(self, query, key, value, edge, gate, edge_scale):
        _, neighbors = self.graph.dense()
        return edge_attention(
            query, key, value, edge, neighbors, gate=gate, edge_scale=edge_scale, scale=SCALE
        )

    def inputs(self, operator):
        if operator in ("attention", "words"):
            return [*self.nodes, *self.edges, *self.past]
        if operator in ("readout", "per_word"):
            return [*self.edges, *self.past]
        edge = self.graph.dense()[0].detach().requires_grad_()
        gate = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
        return [*self.nodes, edge, gate, torch.randn((), dtype=torch.float64, requires_grad=True)]


OPERATORS = ["attention", "words", "readout", "per_word", "dense"]


@pytest.mark.parametrize("correlation, masked", [("shared", True), ("batched", False)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(make, operator, correlation, masked, backend):
    problem = Problem(make, correlation=correlation, masked=masked)
    # An interpreted call takes milliseconds: fast mode compares random projections of the Jacobians.
    fast = backend == "interpreter"
    assert gradcheck(getattr(problem, operator), problem.inputs(operator), fast_mode=fast)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck_where_a_factor_is_zero(make, operator, backend):
    """A gate of 0 (r = 0) and an edge whose 1 + s is 0: a gradient that divides by either would be NaN."""
    problem = Problem(make, layers=2)
    first = problem.history[0]
    with torch.no_grad():
        first.gate[:, :, ::2] = 0.0
        first.query[:] = torch.tensor([1.0, 0.0])
        first.key[:] = torch.tensor([-1.0 / SCALE, 3.0])  # 1 + s is exactly 0 on every edge
    inputs = problem.inputs(operator)
    assert gradcheck(getattr(problem, operator), inputs, fast_mode=backend == "interpreter")
    outputs = getattr(problem, operator)(*inputs)
    total = sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(total, inputs, allow_unused=True) if g is not None
    )


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_gradgradcheck(make, operator):
    """Only the reference can be differentiated twice."""
    problem = Problem(make, layers=1, masked=True)
    with use_backend("reference"):
        assert gradgradcheck(getattr(problem, operator), problem.inputs(operator))


def test_opcheck(make):
    problem = Problem(make, layers=1)
    graph = problem.graph
    fields = [
        x.detach()
        for x in (
            graph.word_weight,
            graph.word_mask,
            graph.emotion_weight,
            graph.correlation,
            graph.emotion_mask,
        )
    ]
    nodes = [x.detach() for x in problem.nodes]
    past = [[x.detach()] for x in problem.history[0][:2]]
    factor = torch.randn(2, 2, 5, dtype=torch.float64)
    edge, neighbors = (x.detach() for x in graph.dense())
    operators = torch.ops.ecore_kernels
    opcheck(operators.graph_attention, (*nodes, *fields, *past, factor, SCALE, True))
    opcheck(operators.edge_readout, (*fields[:4], None, *past, None, SCALE, False))
    opcheck(operators.edge_attention, (*nodes, edge, neighbors, factor, factor.sum(), SCALE))


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_fused_kernels_refuse_a_second_derivative(make, operator, backend):
    """Silence would be a wrong gradient: only the reference is differentiable twice."""
    if backend == "reference":
        pytest.skip("the reference has second derivatives")
    problem = Problem(make, layers=1)
    inputs = problem.inputs(operator)
    outputs = getattr(problem, operator)(*inputs)
    total = sum(x.square().sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
    first = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
    total = sum(g.sum() for g in first if g is not None)
    with pytest.raises(NotImplementedError, match="no second derivative in fused kernels"):
        torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


def test_torch_func_inside_of_compiled_code_gives_no_silent_zeros(make, fresh_compile):
    problem = Problem(make, layers=1)
    first, *others = [x.detach() for x in problem.inputs("dense")]

    def gradient(x):
        return torch.func.grad(lambda y: problem.dense(y, *others)[0].square().sum())(x)

    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(first), gradient(first))


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_fused_kernels_refuse_what_would_be_silent_zeros(make, operator, backend):
    problem = Problem(make, layers=1)
    inputs = [x.detach() for x in problem.inputs(operator)]

    def total(*args):
        outputs = getattr(problem, operator)(*args)
        return sum(x.square().sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))

    def twice(first):
        return torch.func.grad(lambda x: torch.func.grad(total)(x, *inputs[1:]).square().sum())(first)

    def tangent(first):
        return torch.func.jvp(lambda x: total(x, *inputs[1:]), (first,), (torch.ones_like(first),))[1]

    def product(first):
        return torch.autograd.functional.hvp(lambda x: total(x, *inputs[1:]), first, torch.ones_like(first))[
            1
        ]

    for derivative, what in (
        (twice, "second"),
        (product, "second"),
        (tangent, "forward-mode"),
    ):
        if backend == "reference":
            assert derivative(inputs[0]).any()
        else:
            with pytest.raises(NotImplementedError, match=f"no {what} derivative in fused kernels"):
                derivative(inputs[0])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("operator", OPERATORS)
def test_func_grad_and_vjp(make, operator):
    problem = Problem(make)
    inputs, function = problem.inputs(operator), getattr(problem, operator)

    def outputs(*args):
        result = function(*args)
        return result if isinstance(result, tuple) else (result,)

    plain = outputs(*inputs)
    weights = tuple(torch.randn_like(x) for x in plain)
    expected = torch.autograd.grad(plain, inputs, weights)

    def loss(*args):
        return sum((x * w).sum() for x, w in zip(outputs(*args), weights, strict=True))

    by_grad = torch.func.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)
    value, pull = torch.func.vjp(outputs, *inputs)
    torch.testing.assert_close(value, plain)
    for by_func in (by_grad, pull(weights)):
        torch.testing.assert_close(by_func, expected)


@pytest.mark.usefixtures("fresh_compile", "backend")
@pytest.mark.parametrize("operator", OPERATORS)
def test_compile(make, operator):
    problem = Problem(make)
    inputs, function = problem.inputs(operator), getattr(problem, operator)
    check_compiled(function, inputs, "aot_eager")


@pytest.mark.usefixtures("fresh_compile", "backend")
@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_compile_with_inductor(make, operator):
    """With gradients for one operator: a backward graph takes long to compile."""
    problem = Problem(make, layers=1)
    inputs = problem.inputs(operator)
    if operator != "attention":
        inputs = [x.detach() for x in inputs]
    check_compiled(getattr(problem, operator), inputs, "inductor")


@pytest.mark.usefixtures("fresh_compile", "backend")
def test_compile_the_same_tensor_three_times(make):
    graph = make.graph()
    x = torch.randn(2, 3, 9, 4, dtype=torch.float64, requires_grad=True)

    def function(x):
        return graph_attention(x, x, x, graph, [EdgeUpdate(x, x, x[..., 0], 0.5)])

    check_compiled(function, [x], "aot_eager")


@pytest.mark.usefixtures("fresh_compile", "backend")
def test_compile_from_raw_intensities(make):
    lengths = torch.tensor([6, 4])
    x = torch.randn(2, 2, 9, 4, dtype=torch.float64, requires_grad=True)

    def function(intensity, correlation, x):
        graph = EmotionGraph.from_intensity(intensity, lengths, (0.0, 0.1), correlation.softmax(-1))
        return graph_attention(x, x, x, graph, receivers="words")

    intensity = torch.rand(2, 6, dtype=torch.float64) * 0.25
    check_compiled(
        function, [intensity, torch.randn(3, 3, dtype=torch.float64, requires_grad=True), x], "aot_eager"
    )


def check_compiled(function, inputs, backend):
    """Assert that one graph without a break gives the same outputs and gradients."""
    leaves = [x for x in inputs if x.requires_grad]
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
        outputs = run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum(x.square().sum() for x in outputs)
        results.append([*outputs, *(torch.autograd.grad(total, leaves) if leaves else ())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("fresh_compile")
def test_compile_otsu():
    values = torch.randn(6, 8)
    expected = otsu(values)
    for backend in ("aot_eager", "inductor"):
        split = torch.compile(otsu, fullgraph=True, backend=backend)(values)
        assert all(torch.equal(a, b) for a, b in zip(split, expected, strict=True))
