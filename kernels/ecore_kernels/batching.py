"""``torch.vmap`` over the registered operators: the mapped dimension becomes a part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import fused, otsu

Dim = int | None


class _Fold:
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


def _batch(tensor: Tensor, dim: Dim) -> int:
    """The size of the first dimension that is not mapped over."""
    return tensor.shape[1 if dim == 0 else 0]


def _one_by_one(operator: Callable[..., list[Tensor]]) -> Callable[..., Any]:
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


# graph_attention --------------------------------------------------------------------------------------------


def _graph_attention(info: Any, dims: Sequence[Any], *arguments: Any) -> Any:
    fold = _Fold(info.batch_size, _batch(arguments[0], dims[0]))
    folded = fold.fold_all(arguments[:6], dims[:6])
    output, saved = torch.ops.ecore_kernels.fused_graph_attention(
        *folded,
        fold.correlation(arguments[6], dims[6], apart=False),
        fold.fold(arguments[7], dims[7]),
        *(fold.fold_all(x, d) for x, d in zip(arguments[8:10], dims[8:10], strict=True)),
        fold.fold(arguments[10], dims[10]),
        *arguments[11:],
    )
    return (fold.unfold(output), fold.unfold(saved, 1)), (0, 1)


def _graph_attention_backward(info: Any, dims: Sequence[Any], *arguments: Any) -> Any:
    operator = torch.ops.ecore_kernels.fused_graph_attention_backward
    if dims[11] is None:  # what was saved lists the nodes of a batch as a whole: it cannot be multiplied
        return _one_by_one(operator)(info, dims, *arguments)
    fold = _Fold(info.batch_size, _batch(arguments[1], dims[1]))
    needs = arguments[14]
    shared = arguments[5].dim() - (dims[5] is not None) == 2
    gradients = operator(
        *fold.fold_all(arguments[:5], dims[:5]),
        fold.correlation(arguments[5], dims[5], apart=needs[-1]),
        fold.fold(arguments[6], dims[6]),
        *(fold.fold_all(x, d) for x, d in zip(arguments[7:9], dims[7:9], strict=True)),
        *fold.fold_all(arguments[9:11], dims[9:11]),
        fold.fold(arguments[11], dims[11], axis=1).contiguous(),
        *arguments[12:],
    )
    return _unfolded(fold, gradients, needs[-1] and shared)


def _unfolded(fold: _Fold, gradients: Sequence[Tensor], shared_correlation: bool) -> Any:
    """Gradients of every member; the last one's batch is added up where the correlation is shared."""
    unfolded = [fold.unfold(x) for x in gradients]
    if shared_correlation:
        unfolded[-1] = unfolded[-1].sum(1)
    return unfolded, [0] * len(unfolded)


# edge_readout -----------------------------------------------------------------------------------------------


def _readout_arguments(fold: _Fold, dims: Sequence[Any], arguments: Sequence[Any], apart: bool) -> list[Any]:
    """The arguments from word_mask to row_factor, folded."""
    return [
        *fold.fold_all(arguments[:2], dims[:2]),
        fold.correlation(arguments[2], dims[2], apart),
        fold.fold(arguments[3], dims[3]),
        *(fold.fold_all(x, d) for x, d in zip(arguments[4:6], dims[4:6], strict=True)),
        fold.fold(arguments[6], dims[6]),
    ]


def _edge_readout(info: Any, dims: Sequence[Any], *arguments: Any) -> Any:
    fold = _Fold(info.batch_size, _batch(arguments[0], dims[0]))
    results = torch.ops.ecore_kernels.fused_edge_readout(
        *_readout_arguments(fold, dims, arguments, apart=False), *arguments[7:]
    )
    return tuple(map(fold.unfold, results)), (0, 0)


def _edge_readout_backward(info: Any, dims: Sequence[Any], *arguments: Any) -> Any:
    fold = _Fold(info.batch_size, _batch(arguments[2], dims[2]))
    needs = arguments[11]
    shared = arguments[4].dim() - (dims[4] is not None) == 2
    gradients = torch.ops.ecore_kernels.fused_edge_readout_backward(
        *fold.fold_all(arguments[:2], dims[:2]),
        *_readout_arguments(fold, dims[2:], arguments[2:], apart=needs[-1]),
        *arguments[9:],
    )
    return _unfolded(fold, gradients, needs[-1] and shared)


# edge_attention ---------------------------------------------------------------------------------------------


def _edge_attention(info: Any, dims: Sequence[Any], *arguments: Any) -> Any:
    fold = _Fold(info.batch_size, _batch(arguments[0], dims[0]))
    output, new_edge, saved = torch.ops.ecore_kernels.fused_edge_attention(
        *fold.fold_all(arguments[:3], dims[:3]),
        *(fold.spread(x, d, apart=False) for x, d in zip(arguments[3:5], dims[3:5], strict=True)),
        fold.fold(arguments[5], dims[5]),
        *arguments[6:],
    )
    updates = arguments[5] is not None  # else new_edge is empty
    return (
        (fold.unfold(output), fold.unfold(new_edge) if updates else new_edge, fold.unfold(saved, 1)),
        (0, 0 if updates else None, 1),
    )


def _edge_attention_backward(info: Any, dims: Sequence[Any], *arguments: Any) -> Any:
    fold = _Fold(info.batch_size, _batch(arguments[2], dims[2]))
    needs, edge, edge_dim = arguments[11], arguments[5], dims[5]
    shared = _batch(edge, edge_dim) == 1
    gradients = torch.ops.ecore_kernels.fused_edge_attention_backward(
        *fold.fold_all(arguments[:5], dims[:5]),
        fold.spread(edge, edge_dim, apart=needs[3]),
        fold.spread(arguments[6], dims[6], apart=False),
        *fold.fold_all(arguments[7:9], dims[7:9]),
        fold.fold(arguments[9], dims[9], axis=1).contiguous(),
        *arguments[10:],
    )
    unfolded = [fold.unfold(x) for x in gradients]
    if needs[3] and shared:
        place = sum(needs[:3])
        unfolded[place] = unfolded[place].sum(1, keepdim=True)
    return unfolded, [0] * len(unfolded)


# otsu -------------------------------------------------------------------------------------------------------


def _otsu(info: Any, dims: Sequence[Any], values: Tensor, max_relevant: int | None, backend: str) -> Any:
    fold = _Fold(info.batch_size, _batch(values, dims[0]))
    results = torch.ops.ecore_kernels.otsu(fold.fold(values, dims[0]), max_relevant, backend)
    return tuple(map(fold.unfold, results)), (0, 0, 0)


for _name, _rule, _library in (
    ("fused_graph_attention", _graph_attention, fused.library),
    ("fused_graph_attention_backward", _graph_attention_backward, fused.library),
    ("fused_edge_readout", _edge_readout, fused.library),
    ("fused_edge_readout_backward", _edge_readout_backward, fused.library),
    ("fused_edge_attention", _edge_attention, fused.library),
    ("fused_edge_attention_backward", _edge_attention_backward, fused.library),
    ("otsu", _otsu, otsu.library),
):
    torch.library.register_vmap(f"ecore_kernels::{_name}", _rule, lib=_library)
