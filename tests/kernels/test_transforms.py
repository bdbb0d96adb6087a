"""Gradients by finite differences, opcheck, torch.func and torch.compile, for every operator."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

from ecore_kernels import (
    EdgeUpdate,
    EmotionGraph,
    available_backends,
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


def not_interpreted(backend):
    """Skip a test of many calls, which torch makes alike whatever the fused backend."""
    if backend == "interpreter":
        pytest.skip("takes minutes under Triton's interpreter")


@pytest.fixture
def check_gradients(backend, assert_same):
    """By finite differences; under Triton's interpreter, whose calls take long, by the reference's gradients."""

    def check(function, inputs):
        if backend != "interpreter":
            assert gradcheck(function, inputs)
            return
        ours = function(*inputs)
        with use_backend("reference"):
            expected = function(*inputs)
        both = (x if isinstance(x, tuple) else (x,) for x in (ours, expected))
        assert_same(*both, inputs)

    return check


@pytest.mark.parametrize("correlation, masked", [("shared", True), ("batched", False)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(make, operator, correlation, masked, check_gradients):
    problem = Problem(make, correlation=correlation, masked=masked)
    check_gradients(getattr(problem, operator), problem.inputs(operator))


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck_where_a_factor_is_zero(make, operator, check_gradients):
    """A gate of 0 (r = 0) and an edge whose 1 + s is 0: a gradient that divides by either would be NaN."""
    problem = Problem(make, layers=2)
    first = problem.history[0]
    with torch.no_grad():
        first.gate[:, :, ::2] = 0.0
        first.query[:] = torch.tensor([1.0, 0.0])
        first.key[:] = torch.tensor([-1.0 / SCALE, 3.0])  # 1 + s is exactly 0 on every edge
    inputs = problem.inputs(operator)
    check_gradients(getattr(problem, operator), inputs)
    outputs = getattr(problem, operator)(*inputs)
    total = sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(total, inputs, allow_unused=True) if g is not None
    )


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_gradgradcheck(make, operator, backend):
    """Of fused kernels by the reference's formulas, at the inputs that were saved."""
    not_interpreted(backend)
    problem = Problem(make, layers=1, masked=True)
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
    options = None, None, None, None, None, 0.0, False, False
    arguments = (*nodes, edge, neighbors, factor, factor.sum(), SCALE, *options)
    opcheck(operators.edge_attention, arguments)


def test_torch_func_inside_of_compiled_code_gives_no_silent_zeros(make, fresh_compile):
    problem = Problem(make, layers=1)
    first, *others = [x.detach() for x in problem.inputs("dense")]

    def gradient(x):
        return torch.func.grad(lambda y: problem.dense(y, *others)[0].square().sum())(x)

    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(first), gradient(first))


def total(problem, operator):
    """The sum of the squares of an operator's results."""

    def function(*inputs):
        outputs = getattr(problem, operator)(*inputs)
        return sum(x.square().sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return function


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_second_derivatives_agree_with_the_references(make, operator, backend):
    """Gradient penalties and nested torch.func, of one input and the rest held."""
    not_interpreted(backend)
    problem = Problem(make, layers=1)
    function = total(problem, operator)
    inputs = [x.detach() for x in problem.inputs(operator)]
    places = tuple(range(len(inputs)))

    def penalty(*inputs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def nested(*inputs):
        def norm(*inputs):
            return sum(g.square().sum() for g in torch.func.grad(function, places)(*inputs))

        return torch.func.grad(norm, places)(*inputs)

    by_backend = penalty(*inputs), nested(*inputs)
    with use_backend("reference"):
        expected = penalty(*inputs)
    for found in by_backend:
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_forward_mode_takes_the_reference(make, operator):
    """Without a named backend; a named one without forward mode refuses, since silence would give zeros."""
    problem = Problem(make, layers=1)
    function = total(problem, operator)
    first, *others = [x.detach() for x in problem.inputs(operator)]

    def of_first(x):
        return function(x, *others)

    direction = torch.randn_like(first)
    gradient = torch.func.grad(of_first)(first)
    _, tangent = torch.func.jvp(of_first, (first,), (direction,))
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    with forward_ad.dual_level():
        dual = of_first(forward_ad.make_dual(first, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
    hessian = torch.func.hessian(of_first)(first)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(of_first))(first), hessian)
    _, product = torch.autograd.functional.hvp(of_first, first, direction)
    torch.testing.assert_close((hessian * direction).flatten(first.dim()).sum(-1), product)
    if "native" in available_backends():
        with use_backend("native"), pytest.raises(RuntimeError, match="it has no forward-mode derivative"):
            torch.func.jvp(of_first, (first,), (direction,))


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


def mapped_inputs(inputs, dims):
    """Three of every input whose dimension is given, side by side there, and the others as they are."""
    return [
        x if d is None else torch.stack([torch.randn_like(x) * 0.1 + x for _ in range(3)], d)
        for x, d in zip(inputs, dims, strict=True)
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mapped", ["all", "first", "but the first", "last"])
@pytest.mark.parametrize("correlation", ["shared", "batched"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_agrees_with_a_loop(make, operator, correlation, mapped, backend):
    """Results, gradients of every member, and gradients through vmap; without a warning of a slow path."""
    not_interpreted(backend)
    problem = Problem(make, layers=1, correlation=correlation)
    inputs = [x.detach() for x in problem.inputs(operator)]
    last = len(inputs) - 1
    chosen = {
        "all": lambda i: i % (inputs[i].dim() + 1),
        "first": lambda i: 0 if i == 0 else None,
        "but the first": lambda i: None if i == 0 else 0,
        "last": lambda i: 0 if i == last else None,
    }[mapped]
    dims = tuple(chosen(i) for i in range(len(inputs)))
    stacked = mapped_inputs(inputs, dims)
    places = tuple(range(len(inputs)))

    def member(i):
        return [x if d is None else x.select(d, i) for x, d in zip(stacked, dims, strict=True)]

    function, gradient = (
        getattr(problem, operator),
        torch.func.grad(total(problem, operator), places),
    )
    for run in (function, gradient):
        looped = [run(*member(i)) for i in range(3)]
        looped = [x if isinstance(x, tuple) else (x,) for x in looped]
        found = torch.vmap(run, dims)(*stacked)
        found = found if isinstance(found, tuple) else (found,)
        for one, others in zip(found, zip(*looped, strict=True), strict=True):
            torch.testing.assert_close(one, torch.stack(others), rtol=1e-10, atol=1e-12)
    # Gradients through the map, of what is shared as of what is not.
    leaves = [x.clone().requires_grad_() for x in stacked]
    whole = torch.vmap(total(problem, operator), dims)(*leaves).sum()
    found = torch.autograd.grad(whole, leaves)
    leaves = [x.clone().requires_grad_() for x in stacked]
    one_by_one = sum(
        total(problem, operator)(
            *(x if d is None else x.select(d, i) for x, d in zip(leaves, dims, strict=True))
        )
        for i in range(3)
    )
    torch.testing.assert_close(found, torch.autograd.grad(one_by_one, leaves), rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_vmap_of_vmap_and_jacobians(make, operator, backend):
    not_interpreted(backend)
    problem = Problem(make, layers=1)
    function = total(problem, operator)
    first, *others = [x.detach() for x in problem.inputs(operator)]
    grid = torch.stack([torch.stack([first * (1 + i + 3 * j) for i in range(2)]) for j in range(3)])

    def of_first(x):
        return function(x, *others)

    found = torch.vmap(torch.vmap(torch.func.grad(of_first), 0), 1, 1)(grid)
    for j in range(3):
        for i in range(2):
            torch.testing.assert_close(found[j, i], torch.func.grad(of_first)(grid[j, i]))
    outputs = getattr(problem, operator)

    def vector(x):
        result = outputs(x, *others)
        return (result[0] if isinstance(result, tuple) else result).flatten()

    jacobian = torch.func.jacrev(vector)(first)
    for i in (0, len(jacobian) - 1):
        torch.testing.assert_close(jacobian[i], torch.func.grad(lambda x, i=i: vector(x)[i])(first))


@pytest.mark.filterwarnings("error")
def test_vmap_of_otsu():
    values = torch.randn(4, 6, 3)
    found = torch.vmap(otsu, 2)(values)
    for i in range(3):
        for one, other in zip(found, otsu(values[:, :, i].contiguous()), strict=True):
            assert torch.equal(one[i], other)
