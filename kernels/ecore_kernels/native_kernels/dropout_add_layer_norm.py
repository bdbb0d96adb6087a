"""Dropout, residual and LayerNorm on a CPU: csrc/dropout_add_layer_norm_cpu.cpp, seen from torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels.native_kernels import addresses, kernel
from ecore_kernels.philox import keep_scale, threshold


def _call(total: Tensor, weight: Tensor, seed: Tensor | None, p: float) -> tuple[int | float, ...]:
    """The arguments that both directions share; the tensors must outlive the call."""
    place = 0 if seed is None else seed.data_ptr()
    return *total.shape, place, threshold(p), keep_scale(p), weight.data_ptr()


def _as(tensor: Tensor | None, kind: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(kind).contiguous()


def _filled(tensor: Tensor | None, like: Tensor, value: float) -> Tensor:
    """A weight or bias [D], or the default of one that is left out."""
    if tensor is None:
        return like.new_full(like.shape[-1:], value)
    return tensor.to(like.dtype).contiguous()


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    results: Sequence[Tensor],
) -> None:
    """Run the forward kernel."""
    normed, total, saved = results
    kind = saved.dtype
    row = saved.new_empty(x.shape[1:])
    inputs = [_as(x, kind), _as(residual, kind), _filled(bias, row, 0.0)]
    scale = _filled(weight, row, 1.0)
    made = [y if y.dtype is kind else y.new_empty(y.shape, dtype=kind) for y in (normed, total)]
    kernel("dropout_add_layer_norm_forward", kind)(
        _call(made[1], scale, seed, p), addresses(inputs), eps, addresses([*made, saved[0], saved[1]]),
        torch.get_num_threads(),
    )  # fmt: skip
    for result, found in zip((normed, total), made, strict=True):
        if result is not found:
            result.copy_(found)


def backward(
    grad_normed: Tensor | None,
    grad_sum: Tensor | None,
    total: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    needs: Sequence[bool],
    results: Sequence[Tensor | None],
) -> None:
    """Run the backward kernel."""
    kind = saved.dtype
    exact = total.to(kind).contiguous()
    scale = _filled(weight, saved.new_empty(exact.shape[1:]), 1.0)
    upstream = [_as(grad_normed, kind), _as(grad_sum, kind)]
    made = [y if y is None or y.dtype is kind else y.new_empty(y.shape, dtype=kind) for y in results]
    kernel("dropout_add_layer_norm_backward", kind)(
        _call(exact, scale, seed, p), addresses([exact, saved[0], saved[1]]), addresses(upstream),
        addresses(made), torch.get_num_threads(),
    )  # fmt: skip
    for result, found in zip(results, made, strict=True):
        if result is not None and found is not None and result is not found:
            result.copy_(found)
