"""Dropout, residual and LayerNorm in plain PyTorch.

Arguments and results are those of ``_results`` and ``_gradients`` in
:mod:`ecore_kernels.operators.dropout_add_layer_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels import reference


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
    """Compute both results, and what the backward needs."""
    normed, total, saved = results
    kind = saved.dtype
    exact = residual.to(kind) + reference.dropped(x.to(kind), seed, p)
    total.copy_(exact)
    saved.copy_(moments(exact, eps))
    value = (exact - saved[0, :, None]) * saved[1, :, None]
    value = value if weight is None else value * weight.to(kind)
    normed.copy_(value if bias is None else value + bias.to(kind))


def moments(total: Tensor, eps: float) -> Tensor:
    """Means of the rows of ``total`` and one over their standard deviations, [2, rows]; differentiable."""
    mean = total.mean(1)
    variance = (total - mean[:, None]).square().mean(1)
    return torch.stack([mean, (variance + eps).rsqrt()])


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
    """Compute the gradients that are needed."""
    found = gradients(grad_normed, grad_sum, total.to(saved.dtype), saved, weight, seed, p)
    for result, gradient in zip(results, found, strict=True):
        if result is not None:
            result.copy_(gradient)


def gradients(
    grad_normed: Tensor | None,
    grad_sum: Tensor | None,
    total: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias, in the type of ``saved``; differentiable by autograd."""
    kind = saved.dtype
    mean, inverse = saved[0, :, None], saved[1, :, None]
    grad = torch.zeros_like(total) if grad_sum is None else grad_sum.to(kind)
    upstream = torch.zeros_like(total) if grad_normed is None else grad_normed.to(kind)
    hat = (total - mean) * inverse
    scaled = upstream if weight is None else upstream * weight.to(kind)
    inner = scaled - scaled.mean(1, keepdim=True) - hat * (scaled * hat).mean(1, keepdim=True)
    grad = grad + inner * inverse
    return reference.dropped(grad, seed, p), grad, (upstream * hat).sum(0), upstream.sum(0)
