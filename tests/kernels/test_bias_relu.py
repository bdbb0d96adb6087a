"""Bias and ReLU after a product, against torch's."""

import pytest
import torch

from ecore_kernels import native
from ecore_kernels.native_kernels import bias_relu

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())


@pytest.mark.parametrize("kind", bias_relu.TYPES)
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 200])
@pytest.mark.parametrize("size", [0, 1, 7, 16, 50, 1200])
def test_against_torch(kind, rows, size):
    generator = torch.Generator().manual_seed(rows + size)
    product, grad = (torch.randn(rows, size, dtype=kind, generator=generator) for _ in range(2))
    bias = torch.randn(size, dtype=kind, generator=generator)
    expected = (product + bias).relu()
    output = bias_relu.forward(product.clone(), bias)
    assert torch.equal(output, expected)
    masked, of_bias = bias_relu.backward(grad, output)
    right = torch.ops.aten.threshold_backward(grad, expected, 0)
    assert torch.equal(masked, right)
    exact = right.double().sum(0)
    torch.testing.assert_close(of_bias.double(), exact, rtol=1e-5, atol=1e-5)
    assert bias_relu.backward(grad, output, of_bias=False)[1] is None


def test_what_is_not_finite():
    """As torch's: NaN stays, and lets the gradient pass."""
    values = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0] * 7
    product = torch.tensor([values])
    output = bias_relu.forward(product.clone(), torch.zeros(35))
    torch.testing.assert_close(output, product.relu(), equal_nan=True)
    masked, _ = bias_relu.backward(torch.ones(1, 35), output)
    assert torch.equal(masked, torch.ops.aten.threshold_backward(torch.ones(1, 35), product.relu(), 0))


def test_the_same_bits_on_any_number_of_threads():
    grad, output = torch.randn(1000, 70), torch.randn(1000, 70)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(bias_relu.backward(grad, output)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_gradients_of_any_strides():
    grad, output = torch.randn(40, 9), torch.randn(40, 9)
    for strided in (grad.T.contiguous().T, torch.ones(1, 1).expand(40, 9)):
        found = bias_relu.backward(strided, output)
        for x, right in zip(found, bias_relu.backward(strided.contiguous(), output), strict=True):
            assert torch.equal(x, right)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, dtype=torch.bfloat16), torch.ones(2, device="meta"), torch.nn.Parameter(torch.ones(2))],
)
def test_what_it_does_not_take(x):
    assert not bias_relu.runs(x)
