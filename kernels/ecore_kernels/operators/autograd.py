"""Calls of autograd functions: cheap outside of ``torch.func`` and torch.compile, right in batches."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _is_batched(gradient: Tensor | None) -> bool:
    """Return True for a gradient of ``torch.autograd.grad(is_grads_batched=True)``: it has no memory of its own."""
    if gradient is None or torch._C._has_storage(gradient):
        return False
    # Python has no other name for this dispatch key; torch.func's ends in the same word.
    return re.search(r"\bBatched\b", str(torch._C._dispatch_keys(gradient))) is not None


def _all_at_once(
    backward: Callable[..., tuple[Any, ...]], ctx: Any, gradients: Sequence[Any]
) -> tuple[Any, ...]:
    """``backward`` of gradients of which some are batched, by ``torch.vmap``, which has rules for the operators.

    Torch's own loop over such a batch refuses operators that take or return lists of tensors.
    """
    level = max(torch._C._vmapmode_increment_nesting() - 1, 1)  # 0 in a GPU's thread, which does not know it
    torch._C._vmapmode_decrement_nesting()
    at = [i for i, gradient in enumerate(gradients) if _is_batched(gradient)]
    places: list[int] = []  # of the results that are there

    def of_member(*members: Tensor) -> tuple[Tensor, ...]:
        every = list(gradients)
        for i, member in zip(at, members, strict=True):
            every[i] = member
        results = backward(ctx, *every)
        places[:] = [i for i, x in enumerate(results) if x is not None]
        found[:] = [None] * len(results)
        return tuple(results[i] for i in places)

    found: list[Tensor | None] = []
    batches = torch.vmap(of_member)(*(torch._remove_batch_dim(gradients[i], level, 0, 0) for i in at))
    for i, batch in zip(places, batches, strict=True):
        found[i] = torch._add_batch_dim(batch, 0, level)
    return tuple(found)


@functools.cache
def _without_transforms(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same function without ``setup_context``: its ``apply`` takes half the time, and ``torch.func`` refuses it."""

    class WithoutTransforms(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            results = function.forward(*arguments)
            function.setup_context(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx, *gradients):
            # Compiled autograd traces this, and has no batches.
            if not torch.compiler.is_compiling() and any(_is_batched(gradient) for gradient in gradients):
                return _all_at_once(function.backward, ctx, gradients)
            return function.backward(ctx, *gradients)

    WithoutTransforms.__name__ = WithoutTransforms.__qualname__ = function.__name__
    return WithoutTransforms


def distinct(values: Sequence[Any]) -> list[Any]:
    """``values`` in which no tensor is there twice: torch.compile takes no such arguments of an autograd function."""
    result = list(values)
    for i, value in enumerate(result):
        if isinstance(value, Tensor) and any(value is other for other in result[:i]):
            result[i] = value.view_as(value)
    return result


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, at less cost where neither ``torch.func`` nor torch.compile is at work."""
    if torch.compiler.is_compiling():
        return function.apply(*distinct(arguments))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return _without_transforms(function).apply(*arguments)
