"""Where the elements of a [B, K, N, d] lie in memory: what the fused kernels take, and how they lay out results."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out_like(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor``, copied only if its strides differ from the model's (dimensions of size 1 aside)."""
    same = all(
        size == 1 or stride == other
        for size, stride, other in zip(tensor.shape, tensor.stride(), model.stride(), strict=True)
    )
    if same:
        return tensor
    return torch.empty_strided(tensor.shape, model.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
        tensor
    )


def dense_rows(tensor: Tensor) -> Tensor:
    """``tensor`` [B, K, N, d], copied if a row's elements do not lie side by side or two elements share memory.

    Copied too if a head's rows reach further than 32 bits count: offsets within a head are that wide.
    """
    apart = all(size == 1 or stride > 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    near = tensor.shape[2] * tensor.stride(2) < 2**31
    if apart and near and (tensor.shape[3] == 1 or tensor.stride(3) == 1):
        return tensor
    return tensor.contiguous()


def empty_rows(model: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised [B, K, rows, width] whose heads lie side by side in memory if the model's do.

    A model that is a transposed [B, N, K, d] then gets a result that flattens back to [B, N, K * d] without a copy.
    """
    batch, resolutions = model.shape[:2]
    if model.stride(1) < model.stride(2):
        return torch.empty(batch, rows, resolutions, width, dtype=dtype, device=model.device).transpose(1, 2)
    return torch.empty(batch, resolutions, rows, width, dtype=dtype, device=model.device)
