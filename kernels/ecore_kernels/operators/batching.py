"""``torch.vmap`` over the registered operators: the mapped dimension becomes a part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.operators import registration

Dim = int | None


class Fold:
    """Folds a mapped dimension of ``size`` into batches of ``batch``, and unfolds it again."""

    def __init__(self, size: int, batch: int) -> None:
        self.size, self.batch = size, batch

    def fold(self, tensor: Tensor | None, dim: Dim, axis: int = 0) -> Tensor | None:
        """``tensor`` with size * batch at ``axis``, the place of its batch without the mapped dimension."""
        if tensor is None:
            return None
        if dim is None:
            tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], self.size, *tensor.shape[axis:])
        else:
            tensor = tensor.movedim(dim, axis)
        return tensor.flatten(axis, axis + 1)

    def fold_saved(self, saved: Tensor, dim: Dim) -> Tensor:
        """The saved result of a forward, [planes, B, ...], with size * B, contiguous."""
        folded = self.fold(saved, dim, axis=1)
        assert folded is not None
        return folded.contiguous()

    def fold_all(self, tensors: Sequence[Tensor], dims: Sequence[Dim]) -> list[Tensor | None]:
        return [self.fold(x, dim) for x, dim in zip(tensors, dims, strict=True)]

    def spread(self, tensor: Tensor | None, dim: Dim, apart: bool) -> Tensor | None:
        """``tensor``, whose batch may be 1, shared by all; with ``apart`` every member of the batch gets its own."""
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
    """A rule that calls ``operator`` for each member in turn."""

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


def register_one_by_one(operator: str) -> None:
    """Give both directions of a fused operator the rule of :func:`one_by_one` under ``torch.vmap``."""
    for name in (f"fused_{operator}", f"fused_{operator}_backward"):

        def rule(info: Any, dims: Any, *arguments: Any, name: str = name) -> Any:
            return one_by_one(getattr(torch.ops.ecore_kernels, name))(info, dims, *arguments)

        torch.library.register_vmap(f"ecore_kernels::{name}", rule, lib=registration.library)


def _folded(
    fold: Fold, schema: Any, dims: Sequence[Any], arguments: Sequence[Any], apart: Collection[str]
) -> list[Any]:
    """The arguments of a registered operator, folded.

    Args:
        apart: names of arguments that every member of the batch gets a copy of.
    """

    def folded(of: Any, value: Any, dim: Any) -> Any:
        if registration.is_list(of):
            return fold.fold_all(value, dim)
        if not isinstance(value, Tensor):
            return value
        if of.name == "correlation":
            return fold.correlation(value, dim, of.name in apart)
        if of.name in ("edge", "neighbors", "bias"):
            return fold.spread(value, dim, of.name in apart)
        return fold.fold_saved(value, dim) if of.name == "saved" else fold.fold(value, dim)

    return [folded(*each) for each in zip(schema.arguments, arguments, dims, strict=True)]


def register(operator: str, shared: Mapping[str, int], saved_as_a_whole: bool = False) -> None:
    """Give both registered operators of ``operator`` their rules.

    The first argument of each operator has a batch.

    Args:
        shared: names of the arguments that members of a batch may share, and the position of each one's gradient among
            the gradients.
        saved_as_a_whole: what the forward saves belongs to its batch as a whole, and cannot be repeated.
    """
    names = f"fused_{operator}", f"fused_{operator}_backward"
    run_forward, run_backward = (getattr(torch.ops.ecore_kernels, name) for name in names)
    forward, backward = map(registration.schema_of, names)
    at = {argument.name: i for i, argument in enumerate(backward.arguments)}

    def forward_rule(info: Any, dims: Sequence[Any], *arguments: Any) -> Any:
        fold = Fold(info.batch_size, batch_of(arguments[0], dims[0]))
        axes = tuple(1 if of.name == "saved" else 0 for of in forward.returns)
        results = run_forward(*_folded(fold, forward, dims, arguments, ()))
        return tuple(map(fold.unfold, results, axes)), axes

    def backward_rule(info: Any, dims: Sequence[Any], *arguments: Any) -> Any:
        # A seed draws other numbers for another batch, and all of a batch share an edge bias.
        as_given = any(name in at and arguments[at[name]] is not None for name in ("seed", "edge_bias"))
        if as_given or (saved_as_a_whole and dims[at["saved"]] is None):
            return one_by_one(run_backward)(info, dims, *arguments)
        fold = Fold(info.batch_size, batch_of(arguments[0], dims[0]))
        needs = arguments[at["needs"]]
        wanted = {name: place for name, place in shared.items() if needs[place]}
        gradients = run_backward(*_folded(fold, backward, dims, arguments, wanted))
        unfolded = [fold.unfold(x) for x in gradients]
        for name, place in wanted.items():
            value, dim, i = arguments[at[name]], dims[at[name]], sum(needs[:place])
            without_batch = value.dim() - (dim is not None) < unfolded[i].dim() - 1
            if without_batch or batch_of(value, dim) == 1:
                unfolded[i] = unfolded[i].sum(1, keepdim=not without_batch)
        return unfolded, [0] * len(unfolded)

    for name, rule in zip(names, (forward_rule, backward_rule), strict=True):
        torch.library.register_vmap(f"ecore_kernels::{name}", rule, lib=registration.library)
