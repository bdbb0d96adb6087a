"""Layouts in memory of tensors [B, K, N, d]: those that the fused kernels take, and those of their results."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def laid_out_like(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor``, copied only if its strides differ from the model's (dimensions of size 1 aside)."""
    strides, wanted = tensor.stride(), model.stride()
    if strides == wanted:
        return tensor
    if all(s == w or size == 1 for s, w, size in zip(strides, wanted, tensor.shape, strict=True)):
        return tensor
    return torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def dense_rows(tensor: Tensor) -> Tensor:
    """``tensor`` [B, K, N, d], copied if a row's elements do not lie side by side or two elements share memory.

    It is also copied if a head's rows span more elements than 32 bits can count, because offsets within a head have 32
    bits.
    """
    shape, strides = tensor.shape, tensor.stride()
    reach, apart = 1, True  # of the dimensions with smaller strides
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            apart = apart and stride >= reach
            reach += (size - 1) * stride
    if apart and (strides[3] == 1 or shape[3] == 1) and shape[2] * strides[2] < 2**31:
        return tensor
    return tensor.contiguous()


def rows_together(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` [N, H, d], copied if a row's elements do not lie side by side; None, and [N, H], stay."""
    if tensor is None or tensor.dim() < 3 or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def empty_rows(model: Tensor, rows: int, width: int, dtype: torch.dtype, heads: int | None = None) -> Tensor:
    """An uninitialised tensor [B, K, rows, width] whose heads lie side by side in memory if those of ``model`` do.

    If ``model`` is a transposed [B, N, K, d], the result then flattens back to [B, N, K * d] without a copy. Heads do
    not lie side by side if a head's rows would span more elements than 32 bits can count. ``heads`` gives another K
    than the model's.
    """
    batch, resolutions = model.shape[0], model.shape[1] if heads is None else heads
    reach = rows * resolutions * width
    # A size that torch traces as a symbol is taken to fit: a guard would refuse torch.export a dynamic one.
    if model.stride(1) < model.stride(2) and (not isinstance(reach, int) or reach < 2**31):
        strides = (rows * resolutions * width, width, resolutions * width, 1)
    else:
        strides = (resolutions * rows * width, rows * width, width, 1)
    return model.new_empty_strided((batch, resolutions, rows, width), strides, dtype=dtype)


def empty_saved(query: Tensor, planes: int) -> Tensor:
    """An uninitialised tensor [planes, B, K, N] for what a forward saves for its backward.

    It is float64 if ``query`` is, else float32. A plane of integers holds them as int32, from its beginning on.
    """
    kind = torch.float64 if query.dtype is torch.float64 else torch.float32
    return query.new_empty((planes, *query.shape[:3]), dtype=kind)


def sum_resolutions(apart: Tensor | None, result: Tensor | None) -> None:
    """Fill a gradient [B, ...], or [...] for all dialogues, with the sum over the resolutions of ``apart`` [B, K, ...].

    Nothing happens where ``apart`` is None.
    """
    if apart is not None and result is not None:
        torch.sum(apart, 1 if result.dim() == apart.dim() - 1 else (0, 1), out=result)


def own_heads(result: Tensor | None, query: Tensor) -> Tensor | None:
    """Return where heads write gradients of keys or values: ``result``, or memory of their own if they share it."""
    if result is None or result.shape[1] == query.shape[1]:
        return result
    return empty_rows(query, result.shape[2], result.shape[3], result.dtype)


def sum_heads(own: Tensor | None, result: Tensor | None) -> None:
    """Fill a gradient of keys or values [B, Hk, N, d] with sums over the heads of what :func:`own_heads` gave."""
    if own is not None and result is not None and own is not result:
        torch.sum(own.unflatten(1, (result.shape[1], -1)), 2, out=result)


def fill_lse(saved: Tensor, lse: Tensor) -> None:
    """Fill the logarithm of every receiver's softmax sum, from what the forward saved; -inf without a neighbour."""
    if lse.numel():
        maximum, inverse = saved.unbind(0)
        lse.copy_(torch.where(inverse == 0, float("-inf"), (maximum - inverse.log2()) * math.log(2.0)))


def sum_updated(grad_new_edge: Tensor | None, neighbors: Tensor | None, result: Tensor | None) -> None:
    """Fill the gradient of what is added to all updated edges; without ``neighbors`` all edges are."""
    if result is None:
        return
    if grad_new_edge is None:
        result.zero_()
        return
    if neighbors is not None:
        grad_new_edge = torch.where(neighbors, grad_new_edge, 0.0)
    result.copy_(
        grad_new_edge.sum(-1).sum(-1).sum()
    )  # in an order that does not depend on the number of threads
