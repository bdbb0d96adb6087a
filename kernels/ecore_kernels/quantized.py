"""Linear layers for few rows, with weights of few bits or as they are."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.refusals import expect_tensors, shown

TYPES = (torch.int8, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """A linear layer, ``x @ (weight * scale)^T + bias``, for few rows; make it by :meth:`of`.

    With int8 or bfloat16 its weights have few bits; float32 weights are as they are, and the layer may share them:
    ``QuantizedLinear(linear.weight.detach(), None, linear.bias.detach())``.

    Attributes:
        weight: [V, D] int8, bfloat16 or float32.
        scale: [V] float32, of each output's weights; None without int8.
        bias: [V] float32, or None.

    Raises:
        ValueError: shapes, types or devices that do not fit each other, or a tensor that requires a gradient.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("weight", self.weight), ("scale", self.scale), ("bias", self.bias)):
            self._check(name, tensor)
        if (self.scale is None) == (self.weight.dtype is torch.int8):
            raise ValueError("QuantizedLinear: scale: expected one with int8 weights, and None with others")

    def _check(self, name: str, tensor: Any) -> None:
        if tensor is None and name != "weight":
            return
        if not isinstance(tensor, Tensor):
            raise ValueError(f"QuantizedLinear: {name}: expected a tensor, got {type(tensor).__name__}")
        if name == "weight":
            if tensor.dim() != 2 or 0 in tensor.shape or tensor.dtype not in TYPES:
                raise ValueError(
                    "QuantizedLinear: weight: expected [V, D], int8, bfloat16 or float32, without a size of 0, got "
                    f"{list(tensor.shape)} {tensor.dtype}"
                )
        elif tuple(tensor.shape) != (len(self.weight),) or tensor.dtype is not torch.float32:
            raise ValueError(
                f"QuantizedLinear: {name}: expected [{len(self.weight)}] float32, got {list(tensor.shape)} "
                f"{tensor.dtype}"
            )
        if tensor.device != self.weight.device:
            raise ValueError(
                f"QuantizedLinear: {name}: expected it on {self.weight.device}, got {tensor.device}"
            )
        if tensor.requires_grad:
            raise ValueError(
                f"QuantizedLinear: {name}: expected no gradient to be wanted: the layer has none"
            )

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.int8
    ) -> QuantizedLinear:
        """Round a layer's weights.

        int8: ``round(weight / scale)``, to even, with ``scale_v = max_d |weight_vd| / 127``: no weight is off by
        more than half a scale. bfloat16: the nearest. float32: a copy.

        Args:
            weight: [V, D], any float type.
            bias: [V], or None.
            dtype: torch.int8, torch.bfloat16 or torch.float32.

        Raises:
            ValueError: another shape or type, or with int8 a weight that is not finite.
        """
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            got = (
                f"{list(weight.shape)} {weight.dtype}"
                if isinstance(weight, Tensor)
                else type(weight).__name__
            )
            raise ValueError(f"QuantizedLinear: weight: expected [V, D] of a float type, got {got}")
        if 0 in weight.shape:
            raise ValueError(
                f"QuantizedLinear: weight: expected [V, D] without a size of 0, got {list(weight.shape)}"
            )
        if not isinstance(dtype, torch.dtype) or dtype not in TYPES:
            raise ValueError(
                "QuantizedLinear: dtype: expected torch.int8, torch.bfloat16 or torch.float32, got "
                f"{shown(dtype)}"
            )
        if bias is not None:
            expect_tensors("QuantizedLinear", bias=bias)
        weight = weight.detach()
        # A copy: the layer must not change when its source changes.
        bias = None if bias is None else bias.detach().to(torch.float32, copy=True)
        if dtype is not torch.int8:
            return cls(weight.to(dtype, copy=True).contiguous(), None, bias)
        weight = weight.float()
        most = weight.abs().amax(1)  # [V]
        if not bool(most.isfinite().all()):
            raise ValueError("QuantizedLinear: weight: expected finite numbers for int8")
        scale = most / 127.0
        # A row too small for a scale is a row of zeros.
        inverse = torch.where(scale > torch.finfo(torch.float32).tiny, 1.0 / scale, 0.0)
        return cls((weight * inverse[:, None]).round().clamp(-127, 127).to(torch.int8), scale, bias)

    def __getstate__(self) -> dict[str, Any]:
        # Only the arguments: cached properties hold addresses of this layer's memory, not of a copy's.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.weight.device

    def to(self, device: str | torch.device) -> QuantizedLinear:
        """Return the layer on another device."""
        parts = (self.weight, self.scale, self.bias)
        return QuantizedLinear(*(x if x is None else x.to(device) for x in parts))  # type: ignore[arg-type]

    def dequantized(self) -> Tensor:
        """Return the weights that the products use, [V, D] float32."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale[:, None]

    @functools.cached_property
    def inputs(self) -> int:
        """D."""
        return self.weight.shape[1]

    @functools.cached_property
    def on_cpu(self) -> bool:
        """True where the weights are in a CPU's memory."""
        return self.weight.is_cpu

    @functools.cached_property
    def _native(self) -> Any:
        """The layer as the extension takes it."""
        from ecore_kernels.native_kernels import quantized_linear

        return quantized_linear.Layer(self.weight, self.scale, self.bias)
