"""Calls of autograd functions, at the least cost that the caller's surroundings allow."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def _without_transforms(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same function without ``setup_context``: its ``apply`` takes half the time, and ``torch.func`` refuses it."""

    class WithoutTransforms(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            results = function.forward(*arguments)
            function.setup_context(ctx, arguments, results)
            return results

        backward = staticmethod(function.backward)

    WithoutTransforms.__name__ = WithoutTransforms.__qualname__ = function.__name__
    return WithoutTransforms


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, at less cost where neither ``torch.func`` nor torch.compile is at work."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return _without_transforms(function).apply(*arguments)
