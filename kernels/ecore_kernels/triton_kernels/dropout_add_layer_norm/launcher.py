"""Launches of dropout, residual and LayerNorm."""

from __future__ import annotations

from collections.abc import Sequence

import triton
from torch import Tensor

from ecore_kernels.philox import keep_scale, threshold
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.dropout_add_layer_norm.kernels import _backward, _forward

MOST_PARTS = 256
"""Programs of a backward; each sums its rows' gradients of weight and bias. The number is the same on every GPU."""


def _options(tile: int) -> dict[str, int]:
    return {"num_warps": min(16, max(1, tile // 256)), "num_stages": 2}


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
    """Launch the forward kernel."""
    normed, total, saved = results
    rows, size = x.shape
    if not rows:
        return
    tile = launch.padded(size)
    arguments = {
        "x": x.contiguous(),
        "residual": residual.contiguous(),
        "normed": normed,
        "total": total,
        "saved": saved,
        "weight": None if weight is None else weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "seed": seed,
        "rows": rows,
        "size": size,
        "threshold": threshold(p),
        "scale_bits": launch.bits(keep_scale(p)),
        "eps_bits": launch.bits(eps),
        "TILE": tile,
    }
    launch.launch(_forward, (rows,), arguments, _options(tile), x.device)


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
    """Launch the backward kernel."""
    grad_x, grad_residual, grad_weight, grad_bias = results
    rows, size = total.shape
    if not rows:
        for gradient in (grad_weight, grad_bias):
            if gradient is not None:
                gradient.zero_()
        return
    tile = launch.padded(size)
    rows_a_program = triton.cdiv(rows, MOST_PARTS)
    programs = triton.cdiv(rows, rows_a_program)
    weight_parts, bias_parts = (
        None if gradient is None else saved.new_empty((programs, size))
        for gradient in (grad_weight, grad_bias)
    )
    arguments = {
        "grad_normed": None if grad_normed is None else grad_normed.contiguous(),
        "grad_sum": None if grad_sum is None else grad_sum.contiguous(),
        "total": total.contiguous(),
        "saved": saved,
        "weight": None if weight is None else weight.contiguous(),
        "seed": seed,
        "grad_x": grad_x,
        "grad_residual": grad_residual,
        "weight_parts": weight_parts,
        "bias_parts": bias_parts,
        "rows": rows,
        "size": size,
        "rows_a_program": rows_a_program,
        "threshold": threshold(p),
        "scale_bits": launch.bits(keep_scale(p)),
        "TILE": tile,
    }
    launch.launch(_backward, (programs,), arguments, _options(tile), total.device)
    for gradient, parts in ((grad_weight, weight_parts), (grad_bias, bias_parts)):
        if gradient is not None and parts is not None:
            gradient.copy_(parts.sum(0))
