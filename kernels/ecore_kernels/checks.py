"""What the operators refuse before they run, and the scale of their scores."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOST_SIGNATURES = 4096
"""Signatures whose checks are remembered, an operator: with sizes that never repeat they would fill the memory."""


def signature(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return what the checks of a call depend on: of a tensor all but its numbers, of another value its class."""
    return tuple(
        [
            (x.__class__, x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
            if isinstance(x, Tensor) and x.layout is torch.strided
            else (x.__class__, x.layout)
            if isinstance(x, Tensor)
            else x.__class__
            for x in values
        ]
    )


def check_tensors(operator: str, **tensors: Any) -> None:
    """Raise ValueError unless the values are dense tensors of real numbers (bool included)."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{operator}: {name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{operator}: {name}: expected a dense tensor, got {tensor.layout}")
        if tensor.is_complex():
            raise ValueError(f"{operator}: {name}: expected real numbers, got {tensor.dtype}")


def check_floats(operator: str, **tensors: Any) -> None:
    """Raise ValueError unless the values are float tensors: results in their type would be cut off to integers."""
    check_tensors(operator, **tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{operator}: {name}: expected a float type, got {tensor.dtype}")


def check_shape(operator: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``tensor`` has ``shape``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{operator}: {name}: expected {list(shape)}, got {list(tensor.shape)}")


def check_number(operator: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a real number."""
    if not isinstance(value, (int, float, numbers.Real)):
        raise ValueError(f"{operator}: {name}: expected a number, got {type(value).__name__}")


def check_scalar(operator: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is one real number, in a tensor of whatever shape or not."""
    if isinstance(value, Tensor):
        check_tensors(operator, **{name: value})
        if value.numel() != 1:
            raise ValueError(f"{operator}: {name}: expected a scalar, got {list(value.shape)}")
    else:
        check_number(operator, name, value)


def check_one_device(operator: str, *tensors: Any) -> None:
    """Raise ValueError if tensors are on more than one device: kernels would take an address for one of their own."""
    devices = [tensor.device for tensor in tensors if isinstance(tensor, Tensor)]
    for device in devices:
        if device != devices[0]:
            raise ValueError(f"{operator}: expected all tensors on one device, got {devices[0]} and {device}")


def check_saveable(operator: str, **tensors: Any) -> None:
    """Raise ValueError if a tensor was made in inference mode, where a gradient asks for it to be saved."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_inference():
            raise ValueError(
                f"{operator}: {name}: an inference tensor cannot be saved for the backward: clone it outside of "
                "inference mode, or call the operator inside of it"
            )
