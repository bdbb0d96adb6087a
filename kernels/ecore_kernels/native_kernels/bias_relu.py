"""Bias and ReLU after a product, on a CPU: csrc/bias_relu_cpu.cpp, seen from torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ecore_kernels import native
from ecore_kernels.native_kernels import address, kernel

TYPES = (torch.float32, torch.float64)


def runs(x: Tensor) -> bool:
    """Return whether the kernels take tensors as ``x``; not where torch traces."""
    known = type(x) is Tensor and x.device.type == "cpu" and x.dtype in TYPES
    return known and native.available() and not torch.compiler.is_compiling()


def forward(product: Tensor, bias: Tensor) -> Tensor:
    """ReLU(product + bias), in place of ``product`` [R, F], contiguous; ``bias`` is [F]."""
    bias = bias.contiguous()
    kernel("bias_relu", product.dtype)(
        *product.shape, bias.data_ptr(), product.data_ptr(), torch.get_num_threads()
    )
    return product


def backward(grad: Tensor, output: Tensor, of_bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """The gradients of the product [R, F] and, where wanted, of the bias [F]; ``output`` is what forward gave.

    The same bits for every number of threads.
    """
    grad = grad.contiguous()
    masked = torch.empty_like(grad)
    sums = grad.new_empty(grad.shape[1:]) if of_bias else None
    kernel("bias_relu_backward", grad.dtype)(
        *grad.shape, grad.data_ptr(), output.data_ptr(), masked.data_ptr(), address(sums),
        torch.get_num_threads(),
    )  # fmt: skip
    return masked, sums
