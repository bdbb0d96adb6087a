"""Products of few rows with a linear layer, and its largest output, for generating word by word."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import backends, native
from ecore_kernels.native_kernels.quantized_linear import Layer
from ecore_kernels.operators.checks import check_floats, check_one_device, check_tensors
from ecore_kernels.operators.registration import PLAIN, dispatches, library
from ecore_kernels.quantized import QuantizedLinear
from ecore_kernels.refusals import wants_gradient

# In plain PyTorch ------------------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """[B, V] in float32 at least."""
    number = torch.promote_types(x.dtype, torch.float32)
    off = backends.autocast_type(x.device) is not None
    with torch.autocast(x.device.type, enabled=False) if off else contextlib.nullcontext():
        product = x.to(number) @ weight.to(number).T
        product = product if scale is None else product * scale
        return product if bias is None else product + bias


def _largest(scores: Tensor, forbidden: Tensor | None) -> tuple[Tensor, Tensor]:
    usable = (scores < math.inf).all(1)
    if forbidden is not None:
        outputs = scores.shape[1]
        there = (forbidden >= 0) & (forbidden < outputs)
        # One more output, for numbers that are no place.
        wide = torch.cat([scores, scores.new_empty(len(scores), 1)], 1)
        scores = wide.scatter(1, torch.where(there, forbidden, outputs), -math.inf)[:, :outputs]
    largest, place = scores.max(1)
    return torch.where(usable, place, 0), torch.where(usable, largest, math.nan)


# The registered operators ------------------------------------------------------------------------------------

_LAYER = "Tensor weight, Tensor? scale, Tensor? bias"
library.define(f"quantized_linear(Tensor x, {_LAYER}, str backend) -> Tensor")
library.define(
    f"quantized_linear_argmax(Tensor x, {_LAYER}, Tensor? forbidden, str backend) -> (Tensor, Tensor)"
)


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, backend: str) -> Tensor:
    _check(x, QuantizedLinear(weight, scale, bias))  # the registered operator can be called directly
    if backend == "native":
        return Layer(weight, scale, bias).linear(x.float()).to(x.dtype)
    return _product(x, weight, scale, bias).to(x.dtype)


def _argmax(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    forbidden: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check(x, QuantizedLinear(weight, scale, bias), forbidden)
    if backend == "native":
        return Layer(weight, scale, bias).argmax(x.float(), forbidden)
    return _largest(_product(x, weight, scale, bias), forbidden)


def _fake_linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_argmax(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=kind)


library.impl("quantized_linear", _linear, "CompositeExplicitAutograd")
library.impl("quantized_linear_argmax", _argmax, "CompositeExplicitAutograd")
torch.library.register_fake("ecore_kernels::quantized_linear", _fake_linear, lib=library)
torch.library.register_fake("ecore_kernels::quantized_linear_argmax", _fake_argmax, lib=library)

# The public functions ----------------------------------------------------------------------------------------


def quantized_linear(x: Tensor, layer: QuantizedLinear, *, backend: str | None = None) -> Tensor:
    """Multiply rows by a linear layer whose weights are int8, bfloat16 or float32.

    It is for few rows, where reading the weights takes the time: an int8 has a quarter of a float32's bytes. With int8
    weights the C++ kernel rounds each row to 16 bits, scaled by its largest number, and then sums the products exactly;
    with other weights rows stay float32. It is for inference only: there is no gradient.

    Args:
        x: [B, D].
        layer: V outputs.
        backend: "reference" or "native"; None takes the fastest that can run the call.

    Returns:
        [B, V], in the type of x.

    Raises:
        ValueError: a shape or a type that does not fit, or a gradient is wanted.
        RuntimeError: the named backend cannot run the call.
    """
    if backend is None and _goes_straight(x, layer):
        return layer._native.linear(x)
    _check(x, layer)
    _check_no_gradient("quantized_linear", x)
    chosen = backends.choose("quantized_linear", backend, x, layer)
    return torch.ops.ecore_kernels.quantized_linear(x, layer.weight, layer.scale, layer.bias, chosen)


def quantized_linear_argmax(
    x: Tensor, layer: QuantizedLinear, forbidden: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Find the largest output of each row: the word that greedy search chooses, without writing all outputs.

    Args:
        x: [B, D].
        layer: V outputs.
        forbidden: [B, F] int64, outputs of each row that may not be chosen; numbers outside of 0 ... V - 1 are ignored.
        backend: as for :func:`quantized_linear`.

    Returns:
        place: [B] int64, the first of equal outputs; 0 if all are forbidden.
        largest: [B] in float32 at least, the output there: minus infinity if all are forbidden, and NaN if any of the
        row's outputs is NaN or infinity.

    Raises:
        ValueError, RuntimeError: as for :func:`quantized_linear`.
    """
    if (
        backend is None
        and _goes_straight(x, layer)
        and (forbidden is None or (type(forbidden) in PLAIN and forbidden.is_cpu and _fits(forbidden, x)))
    ):
        return layer._native.argmax(x, forbidden)
    _check(x, layer, forbidden)
    _check_no_gradient("quantized_linear_argmax", x)
    chosen = backends.choose("quantized_linear_argmax", backend, x, layer, forbidden)
    return torch.ops.ecore_kernels.quantized_linear_argmax(
        x, layer.weight, layer.scale, layer.bias, forbidden, chosen
    )


def _fits(forbidden: Tensor, x: Tensor) -> bool:
    return forbidden.dim() == 2 and len(forbidden) == len(x) and forbidden.dtype is torch.int64


def _goes_straight(x: Any, layer: Any) -> bool:
    """Return True if the C++ kernel can run the call without further checks.

    All checks together take as long as a small layer's product, and a word of an answer needs some thirty of those.
    """
    return (
        type(layer) is QuantizedLinear
        and x is not None
        and not dispatches((x,))  # a tensor, and nothing intercepts the call
        and native.available()
        and layer.on_cpu
        and x.is_cpu
        and x.dtype is torch.float32
        and x.dim() == 2
        and x.shape[1] == layer.inputs
        and x.layout is torch.strided
        and backends.named() is None
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not backends.differentiates_forward()
    )


def _check_no_gradient(operator: str, x: Tensor) -> None:
    if torch.is_grad_enabled() and wants_gradient(x):
        raise ValueError(
            f"{operator}: x: it requires a gradient, and weights of few bits are for inference: expected "
            "torch.no_grad() or x.detach()"
        )


def _check(x: Any, layer: Any, forbidden: Any = None, **_: Any) -> None:
    """Raise ValueError unless the arguments fit each other."""
    check_floats("quantized_linear", x=x)
    if not isinstance(layer, QuantizedLinear):
        raise ValueError(f"quantized_linear: layer: expected a QuantizedLinear, got {type(layer).__name__}")
    if x.dim() != 2 or x.shape[1] != layer.weight.shape[1]:
        raise ValueError(f"quantized_linear: x: expected [B, {layer.weight.shape[1]}], got {list(x.shape)}")
    check_one_device("quantized_linear", x, layer.weight, forbidden)
    if forbidden is None:
        return
    check_tensors("quantized_linear_argmax", forbidden=forbidden)
    if not _fits(forbidden, x):
        raise ValueError(
            f"quantized_linear_argmax: forbidden: expected [{len(x)}, F] int64, got {list(forbidden.shape)} "
            f"{forbidden.dtype}"
        )


backends.register("quantized_linear", quantized_linear, _check)
backends.register("quantized_linear_argmax", quantized_linear_argmax, _check)
