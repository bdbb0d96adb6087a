"""Checks of arguments that the operators make before they run."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.graph import EmotionGraph
from ecore_kernels.operators.history import EdgeUpdate


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
    """Raise ValueError unless the values are float tensors: results in an integer type would be truncated."""
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
    """Raise ValueError unless ``value`` is one real number, or a tensor of any shape that holds one."""
    if isinstance(value, Tensor):
        check_tensors(operator, **{name: value})
        if value.numel() != 1:
            raise ValueError(f"{operator}: {name}: expected a scalar, got {list(value.shape)}")
    else:
        check_number(operator, name, value)


def seed_of(seed: Any, device: torch.device) -> Tensor:
    """A seed of 64 bits, any integer type, as an int64 of no dimensions."""
    seed = int(seed)  # NumPy's are not as wide
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def check_one_device(operator: str, *tensors: Any) -> None:
    """Raise ValueError if tensors are on several devices: a kernel would read a foreign address as its own."""
    devices = [tensor.device for tensor in tensors if isinstance(tensor, Tensor)]
    for device in devices:
        if device != devices[0]:
            raise ValueError(f"{operator}: expected all tensors on one device, got {devices[0]} and {device}")


def check_saveable(operator: str, **tensors: Any) -> None:
    """Raise ValueError if a gradient needs to save a tensor that was made in inference mode."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_inference():
            raise ValueError(
                f"{operator}: {name}: an inference tensor cannot be saved for the backward: clone it outside of "
                "inference mode, or call the operator inside of it"
            )


def check_graph(operator: str, graph: Any) -> None:
    """Raise ValueError unless ``graph`` is an EmotionGraph of dense tensors."""
    if not isinstance(graph, EmotionGraph):
        raise ValueError(f"{operator}: graph: expected an EmotionGraph, got {type(graph).__name__}")


def check_updates(operator: str, history: Any) -> None:
    """Raise ValueError unless ``history`` is a sequence of EdgeUpdate."""
    if isinstance(history, EdgeUpdate):
        raise ValueError(
            f"{operator}: history: expected a sequence of EdgeUpdate, got a single one: [update]"
        )
    if not isinstance(history, (list, tuple)):
        raise ValueError(
            f"{operator}: history: expected a sequence of EdgeUpdate, got {type(history).__name__}"
        )
    for layer, update in enumerate(history):
        if not isinstance(update, EdgeUpdate):
            raise ValueError(
                f"{operator}: history[{layer}]: expected EdgeUpdate(query, key, gate, edge_scale), got "
                f"{type(update).__name__}"
            )


def check_history(operator: str, history: Any, leading: tuple[int, int, int], dim: int | None = None) -> None:
    """Raise ValueError unless every update has queries and keys [B, K, N, d] of one d and a gate [B, K, N] or none.

    Args:
        dim: the d that they must have; None takes that of the first.
    """
    check_updates(operator, history)
    for layer, update in enumerate(history):
        name = f"history[{layer}]"
        check_floats(operator, **{f"{name}.query": update.query, f"{name}.key": update.key})
        if update.query.dim() != 4:
            raise ValueError(
                f"{operator}: {name}.query: expected [B, K, N, d], got {list(update.query.shape)}"
            )
        shape = (*leading, history[0].query.shape[3] if dim is None else dim)
        for part, tensor in (("query", update.query), ("key", update.key)):
            check_shape(operator, f"{name}.{part}", tensor, shape)
        check_gate(operator, f"{name}.", update.gate, update.edge_scale, leading)


def check_gate(operator: str, where: str, gate: Any, edge_scale: Any, leading: tuple[int, int, int]) -> None:
    """Raise ValueError unless there are a gate [B, K, N] and a scalar edge scale, or neither."""
    if (gate is None) != (edge_scale is None):
        what = f"{where.removesuffix('.')}: " if where else ""
        raise ValueError(f"{operator}: {what}expected gate and edge_scale both given or both left out")
    if gate is not None:
        check_tensors(operator, **{f"{where}gate": gate})
        check_shape(operator, f"{where}gate", gate, leading)
        check_scalar(operator, f"{where}edge_scale", edge_scale)
