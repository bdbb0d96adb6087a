"""Linear layers for few rows on a CPU: csrc/quantized_linear_cpu.cpp, seen from torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ecore_kernels.native_kernels import CPU, address, kernel


class Layer:
    """A layer as the extension takes it; it reads the tensors in place.

    Args:
        weight: [V, D] int8, bfloat16 or float32.
        scale, bias: [V] float32, or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        scale = scale if scale is None else scale.contiguous()
        bias = bias if bias is None else bias.contiguous()
        self._kept = (weight, scale, bias)
        self.outputs = len(weight)
        self._numbers = (*weight.shape, weight.stride(0), weight.data_ptr(), address(scale), address(bias))
        self._linear = kernel("quantized_linear", weight.dtype)
        self._argmax = kernel("quantized_linear_argmax", weight.dtype)

    def linear(self, x: Tensor) -> Tensor:
        """x [B, D] float32 -> [B, V]."""
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        output = x.new_empty(rows, self.outputs)
        self._linear(
            self._numbers, x.data_ptr(), rows, x.stride(0), output.data_ptr(), torch.get_num_threads()
        )
        return output

    def argmax(self, x: Tensor, forbidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, D] float32, forbidden [B, F] int64 or None -> place and value of each row's largest output."""
        x = x if x.stride(1) == 1 else x.contiguous()
        forbidden = None if forbidden is None else forbidden.contiguous()
        place = torch.empty(len(x), device=CPU, dtype=torch.int64)
        largest = torch.empty(len(x), device=CPU, dtype=torch.float32)
        self._argmax(
            self._numbers, x.data_ptr(), len(x), x.stride(0),
            address(forbidden), 0 if forbidden is None else forbidden.shape[1],
            place.data_ptr(), largest.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return place, largest
