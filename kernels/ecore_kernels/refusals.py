"""Reasons against a call that several backends share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wants_gradient(tensor: Tensor) -> bool:
    """Return True if ``tensor`` requires a gradient at any level of torch.func."""
    while not tensor.requires_grad:
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def no_gradient_to_words(graph: Any) -> list[str]:
    """Intensities come from a lexicon: the fused kernels do not differentiate them, and must not pretend to."""
    asked = graph is not None and torch.is_grad_enabled() and wants_gradient(graph.word_weight)
    return ["gives no gradient to word_weight"] if asked else []


def not_inside_torch_func(**options: bool) -> list[str]:
    """The reason against what members of a vmapped batch could not share; empty if the call wants none of it."""
    wanted = [name for name, is_wanted in options.items() if is_wanted]
    if not wanted or torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return []
    return [f"has no {' and '.join(wanted)} inside of torch.func"]
