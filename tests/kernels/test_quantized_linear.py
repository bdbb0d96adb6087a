"""Linear layers of few bits: products within a bound worked out by hand, the largest output, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from ecore_kernels import (
    QuantizedLinear,
    explain,
    native,
    quantized_linear,
    quantized_linear_argmax,
    use_backend,
)
from tests.kernels.native_problems import run_python

needs_native = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
kinds = pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16, torch.float32])
INPUTS = [1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 300]


def layer_of(outputs: int, inputs: int, kind: torch.dtype, bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(outputs * 1000 + inputs)
    return QuantizedLinear.of(
        torch.randn(outputs, inputs), torch.randn(outputs) if bias else None, dtype=kind
    )


def exact(x: Tensor, layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """The product in float64, and what may be missing: each input off by half a step, and float32's rounding."""
    weight = layer.weight.double() * (1.0 if layer.scale is None else layer.scale.double()[:, None])
    product = x.double() @ weight.T + (0.0 if layer.bias is None else layer.bias.double())
    terms = x.double().abs() @ weight.abs().T
    half_step = 0.0
    if layer.scale is not None:
        half_step = x.double().abs().amax(1, keepdim=True) / 32767 / 2 * weight.abs().sum(1)
    return product, half_step + 2.0**-22 * (terms + product.abs() + 1e-30)


@backends
@kinds
@pytest.mark.parametrize("inputs", INPUTS)
def test_products(backend, kind, inputs):
    for outputs, rows in ((1, 1), (5, 2), (67, 3), (131, 7)):
        layer = layer_of(outputs, inputs, kind, bias=outputs != 5)
        x = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
        found = quantized_linear(x, layer, backend=backend)
        expected, tolerance = exact(x, layer)
        assert found.dtype is torch.float32
        assert ((found.double() - expected).abs() <= tolerance).all()


@backends
@pytest.mark.parametrize("inputs", [2048, 2049, 4096, 5003])
def test_sums_of_32_bits_do_not_overflow(backend, inputs):
    """The largest products of all, with one sign."""
    layer = QuantizedLinear(torch.full((3, inputs), -128, dtype=torch.int8), torch.ones(3))
    found = quantized_linear(torch.full((1, inputs), 3.0), layer, backend=backend)
    torch.testing.assert_close(found, torch.full((1, 3), -384.0 * inputs))


@kinds
def test_rounding(kind):
    weight = torch.randn(9, 33) * torch.logspace(-6, 3, 9)[:, None]
    layer = QuantizedLinear.of(weight, dtype=kind)
    if kind is not torch.int8:
        assert torch.equal(layer.dequantized(), weight.to(kind).float())
        return
    torch.testing.assert_close(layer.scale, weight.abs().amax(1) / 127)
    off = (layer.dequantized() - weight).abs()
    assert (off <= 0.5001 * layer.scale[:, None]).all()
    assert layer.weight.abs().amax(1).eq(127).all()  # no bit is wasted


@backends
@kinds
@pytest.mark.parametrize("outputs", [1, 63, 64, 600, 1500])
def test_largest_output(backend, kind, outputs):
    layer, rows = layer_of(outputs, 40, kind), 5
    x = torch.randn(rows, 40)
    scores = quantized_linear(x, layer, backend=backend)
    for taken in (0, 1, 3):  # the best, the two best, ...
        forbidden, left = None, scores
        if taken:
            forbidden = scores.topk(min(taken, outputs)).indices
            left = scores.scatter(1, forbidden, -math.inf)
            forbidden = torch.cat([forbidden, torch.tensor([[-1, outputs]] * rows)], 1)  # no places
        place, largest = quantized_linear_argmax(x, layer, forbidden, backend=backend)
        assert torch.equal(largest, left.amax(1))
        assert torch.equal(place, left.argmax(1))


@backends
def test_first_of_equal_outputs(backend):
    layer = QuantizedLinear(torch.ones(1400, 20, dtype=torch.int8), torch.ones(1400))
    place, _ = quantized_linear_argmax(torch.ones(2, 20), layer, torch.tensor([[0], [5]]), backend=backend)
    assert place.tolist() == [1, 0]


@backends
@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(backend, kind, bad):
    """They are seen, also where the output is forbidden, and the other rows are as they were."""
    layer = layer_of(700, 24, kind)
    x = torch.randn(3, 24)
    good, best = quantized_linear_argmax(x, layer, backend=backend)
    x[1, 3] = bad
    place, largest = quantized_linear_argmax(x, layer, backend=backend)
    assert largest[1].isnan()
    assert place[1] == 0
    assert torch.equal(place[::2], good[::2])
    assert torch.equal(largest[::2], best[::2])
    bias = torch.zeros(700)
    bias[650] = math.nan
    spoilt = QuantizedLinear(layer.weight, layer.scale, bias)
    _, largest = quantized_linear_argmax(x[:1], spoilt, torch.tensor([[650]]), backend=backend)
    assert largest.isnan().all()


@backends
def test_zeros_and_numbers_near_the_smallest(backend):
    layer = layer_of(6, 20, torch.int8)
    for size in (0.0, 1e-44, 1e-36):
        found = quantized_linear(torch.full((1, 20), size), layer, backend=backend)
        torch.testing.assert_close(found[0], layer.bias)
    assert QuantizedLinear.of(torch.full((2, 3), 1e-44)).dequantized().abs().max() < 1e-43


@backends
@kinds
def test_other_types_and_strides(backend, kind):
    layer = layer_of(50, 40, kind)
    wide = torch.randn(4, 80)
    expected = quantized_linear(wide[:, ::2].contiguous(), layer, backend=backend)
    strided = QuantizedLinear(layer.weight.T.contiguous().T, layer.scale, layer.bias)
    assert torch.equal(quantized_linear(wide[:, ::2], strided, backend=backend), expected)
    half = wide[:, :40].half()
    expected = quantized_linear(half.float(), layer, backend=backend).half()
    assert torch.equal(quantized_linear(half, layer, backend=backend), expected)
    assert quantized_linear(wide[:0, :40], layer, backend=backend).shape == (0, 50)


@needs_native
@kinds
def test_same_bits_whatever_the_threads_and_the_rows_beside(kind):
    layer, x = layer_of(3000, 300, kind), torch.randn(9, 300)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [
                quantized_linear(x, layer),
                torch.cat([quantized_linear(row, layer) for row in x.split(1)]),
            ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


BITS = """
import torch
from ecore_kernels import QuantizedLinear, quantized_linear, quantized_linear_argmax
def bits():
    for inputs in (5, 300, 2600):
        generator = torch.Generator().manual_seed(inputs)
        weight, x = (torch.randint(-9, 10, (n, inputs), generator=generator) / 4 for n in (70, 7))
        for kind in (torch.int8, torch.bfloat16, torch.float32):
            layer = QuantizedLinear.of(weight, dtype=kind)
            yield quantized_linear(x, layer).view(torch.int32).tolist()
            yield [part.tolist() for part in quantized_linear_argmax(x, layer)]
"""


@needs_native
@pytest.mark.parametrize("name", native.simd()[1][:-1] if native.available() else [])
def test_instruction_sets_agree(name):
    """int8's sums are exact, and so are bfloat16's of small integers: the same bits from every set."""
    here: dict[str, Any] = {}
    exec(BITS, here)
    done = run_python("-c", BITS + "print(list(bits()))", ECORE_KERNELS_SIMD=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(list(here["bits"]()))


@backends
@kinds
def test_registered_operators(backend, kind):
    layer, x = layer_of(20, 12, kind), torch.randn(3, 12)
    flat = (x, layer.weight, layer.scale, layer.bias)
    opcheck(torch.ops.ecore_kernels.quantized_linear, (*flat, backend))
    opcheck(torch.ops.ecore_kernels.quantized_linear_argmax, (*flat, torch.tensor([[1]] * 3), backend))
    with use_backend(backend):
        whole = torch.compile(lambda x: quantized_linear(x, layer), fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(x), quantized_linear(x, layer))


def test_what_is_refused():
    layer, x = layer_of(4, 3, torch.int8), torch.randn(2, 3)
    weight = torch.randn(4, 3)
    for wrong, message in (
        (lambda: quantized_linear(x[:, :2], layer), r"x: expected \[B, 3\], got \[2, 2\]"),
        (lambda: quantized_linear(x.long(), layer), "x: expected a float type"),
        (lambda: quantized_linear(x, weight), "layer: expected a QuantizedLinear, got Tensor"),
        (lambda: quantized_linear(x.requires_grad_(), layer), "x: it requires a gradient"),
        (lambda: quantized_linear_argmax(x, layer), "x: it requires a gradient"),
        (
            lambda: quantized_linear_argmax(x.detach(), layer, torch.zeros(2, 1)),
            r"forbidden: expected \[2, F\] int64, got \[2, 1\] torch.float32",
        ),
        (
            lambda: QuantizedLinear.of(weight, dtype=torch.float16),
            "dtype: expected torch.int8, torch.bfloat16 or",
        ),
        (lambda: QuantizedLinear.of(weight / 0), "weight: expected finite numbers for int8"),
        (lambda: QuantizedLinear.of(weight[0]), r"weight: expected \[V, D\] of a float type"),
        (
            lambda: QuantizedLinear(weight.double()),
            "weight: expected .* bfloat16 or float32, .* torch.float64",
        ),
        (lambda: QuantizedLinear(layer.weight), "scale: expected one with int8"),
        (lambda: QuantizedLinear(weight.bfloat16(), layer.scale), "scale: .* None with others"),
        (lambda: QuantizedLinear(layer.weight, layer.scale[:3]), r"scale: expected \[4\] float32, got \[3\]"),
        (
            lambda: QuantizedLinear(layer.weight, layer.scale, torch.zeros(4, requires_grad=True)),
            "bias: expected no gradient",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with torch.no_grad():
        assert not quantized_linear(x, layer).requires_grad


@needs_native
def test_the_choice_of_a_backend():
    layer, x = layer_of(4, 3, torch.int8), torch.randn(2, 3)
    assert explain(quantized_linear, x, layer).startswith("quantized_linear: native")
    report = explain(quantized_linear_argmax, x.double(), layer)
    assert report.startswith("quantized_linear_argmax: reference")
    assert "takes float16, bfloat16, float32, not float64" in report
    assert "triton: has no quantized_linear_argmax kernel" in report
    with pytest.raises(RuntimeError, match="not float64"):
        quantized_linear(x.double(), layer, backend="native")
    assert quantized_linear(x.double(), layer).dtype is torch.float64


@needs_native
def test_backend_that_is_named_runs(monkeypatch):
    """The short way to the C++ kernel does not pass by what was named."""
    layer, x = layer_of(4, 3, torch.int8), torch.randn(2, 3)
    monkeypatch.setattr(type(layer._native), "linear", lambda *_: pytest.fail("the kernel was called"))
    with use_backend("reference"):
        quantized_linear(x, layer)


@kinds
def test_copies_read_their_own_memory(kind):
    """After a product, too: what the kernel keeps of a layer belongs to that layer's memory."""
    layer, x = layer_of(5, 4, kind), torch.randn(2, 4)
    expected = quantized_linear(x, layer)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    layer.weight.zero_()
    for other in copies:
        assert torch.equal(quantized_linear(x, other), expected)
