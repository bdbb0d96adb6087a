"""Reasons against a call that several backends share, and parts of messages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def shown(value: Any) -> str:
    """Return a wrong argument as a message of one line names it: a tensor's numbers take several."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return repr(value)


def expect_tensors(where: str, **values: Any) -> None:
    """Raise ValueError unless the values are tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {name}: expected a tensor, got {type(value).__name__}")


def wants_gradient(tensor: Tensor) -> bool:
    """Return True if ``tensor`` requires a gradient at any level of torch.func."""
    while not tensor.requires_grad:
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def no_gradient_to_words(graph: Any) -> list[str]:
    """The reason against a gradient of word intensities, which come from a lexicon: fused kernels have none."""
    asked = graph is not None and torch.is_grad_enabled() and wants_gradient(graph.word_weight)
    return ["gives no gradient to word_weight"] if asked else []


def not_inside_torch_func(**options: bool) -> list[str]:
    """The reason against options that members of a vmapped batch cannot share; empty if a call uses none."""
    wanted = [name for name, is_wanted in options.items() if is_wanted]
    if not wanted or torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return []
    return [f"has no {' and '.join(wanted)} inside of torch.func"]
