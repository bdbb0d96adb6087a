"""``torch.vmap`` over the registered operators: the mapped dimension becomes a part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Dim = int | None


class Fold:
    """Folds a mapped dimension of ``size`` into batches of ``batch``, and unfolds it again."""

    def __init__(self, size: int, batch: int) -> None:
        self.size, self.batch = size, batch

    def fold(self, tensor: Tensor | None, dim: Dim, axis: int = 0) -> Tensor | None:
        """``tensor`` whose batch is at ``axis``, in its own numbering, with size * batch there."""
        if tensor is None:
            return None
        if dim is None:
            tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], self.size, *tensor.shape[axis:])
        else:
            tensor = tensor.movedim(dim, axis)
        return tensor.flatten(axis, axis + 1)

    def fold_saved(self, saved: Tensor, dim: Dim) -> Tensor:
        """What a forward has left, [planes, B, ...], with size * B, contiguous."""
        folded = self.fold(saved, dim, axis=1)
        assert folded is not None
        return folded.contiguous()

    def fold_all(self, tensors: Sequence[Tensor], dims: Sequence[Dim]) -> list[Tensor | None]:
        return [self.fold(x, dim) for x, dim in zip(tensors, dims, strict=True)]

    def spread(self, tensor: Tensor | None, dim: Dim, apart: bool) -> Tensor | None:
        """``tensor`` whose batch may be 1 for all; with ``apart`` every member of the batch gets its own."""
        if tensor is None or (dim is None and tensor.shape[0] == 1 and not apart):
            return tensor
        tensor = tensor[None].expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.expand(self.size, self.batch, *tensor.shape[2:]).flatten(0, 1)

    def correlation(self, tensor: Tensor, dim: Dim, apart: bool) -> Tensor:
        """[P, P] or [B, P, P]; with ``apart`` the latter."""
        shared = tensor.dim() - (dim is not None) == 2
        if not shared:
            folded = self.fold(tensor, dim)
            assert folded is not None
            return folded
        if dim is None and not apart:
            return tensor
        tensor = tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor[:, None].expand(self.size, self.batch, *tensor.shape[1:]).flatten(0, 1)

    def unfold(self, tensor: Tensor, axis: int = 0) -> Tensor:
        return tensor.unflatten(axis, (self.size, tensor.shape[axis] // self.size))


def batch_of(tensor: Tensor, dim: Dim) -> int:
    """The size of the first dimension that is not mapped over."""
    return tensor.shape[1 if dim == 0 else 0]


def one_by_one(operator: Callable[..., list[Tensor]]) -> Callable[..., Any]:
    """A rule that calls ``operator`` for one member after the other."""

    def rule(info: Any, dims: Sequence[Any], *arguments: Any) -> Any:
        def member(value: Any, dim: Any, i: int) -> Any:
            if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [member(v, d, i) for v, d in zip(value, dim, strict=True)]
            return value if dim is None else value.select(dim, i)

        results = [
            operator(*(member(a, d, i) for a, d in zip(arguments, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = [torch.stack(of) for of in zip(*results, strict=True)]
        return stacked, [0] * len(stacked)

    return rule


def unfolded(fold: Fold, gradients: Sequence[Tensor], shared_correlation: bool) -> Any:
    """Gradients of every member; the last one's batch is added up where the correlation is shared."""
    unfolded = [fold.unfold(x) for x in gradients]
    if shared_correlation:
        unfolded[-1] = unfolded[-1].sum(1)
    return unfolded, [0] * len(unfolded)
