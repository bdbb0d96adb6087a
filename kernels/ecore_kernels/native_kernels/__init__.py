"""The CPU kernels, in C++: one file an operator, which allocates tensors and hands addresses to the extension.

``precision``, which the registered operators take, is about GPUs: here float32 is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ecore_kernels import native

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Half precision is converted before and after: a CPU computes it in float32."""


def why_not(*tensors: Tensor) -> list[str]:
    """The reasons why the kernels cannot run on these queries, keys or values [B, K, N, d]; empty if they can."""
    if not native.available():
        return [native.unavailable_reason()]
    reasons = []
    for device in dict.fromkeys(tensor.device.type for tensor in tensors):
        if device != "cpu":
            reasons.append(f"runs on CPU, not on {device}")
    kinds = dict.fromkeys(tensor.dtype for tensor in tensors)
    for kind in kinds:
        if kind not in TYPES:
            takes = ", ".join(str(known).removeprefix("torch.") for known in TYPES)
            reasons.append(f"takes {takes}, not {str(kind).removeprefix('torch.')}")
    return reasons


@functools.cache
def kernel(name: str, kind: torch.dtype) -> Callable[..., None]:
    """The extension's function of that name for that type."""
    return getattr(native._native, f"{name}_{str(kind).removeprefix('torch.')}")


def dense(tensor: Tensor) -> Tensor:
    """``tensor``, copied if the elements of a row do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def heads(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """A [B, K, N, d] as the extension takes it: address, strides over B, K and N; 0 for None."""
    if tensor is None:
        return 0, 0, 0, 0
    batch, head, row, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, row


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check_sizes(operator: str, word_mask: Tensor, emotions: int) -> None:
    """Raise ValueError unless a registered operator, called by itself, got a graph as EmotionGraph would take it.

    The kernels take the first word, ``[CLS]``, for granted: without one they would read beyond their arguments.
    """
    if min(*word_mask.shape[1:], emotions) < 1:
        raise ValueError(
            f"{operator}: expected at least one resolution, one word ([CLS]) and one emotion, got word_mask "
            f"{list(word_mask.shape)} and {emotions} emotions"
        )


def graph_arguments(
    word_mask: Tensor,
    emotion_mask: Tensor | None,
    correlation: Tensor,
    emotions: int,
    word_weight: Tensor | None = None,
    emotion_weight: Tensor | None = None,
) -> tuple[int, ...]:
    """A graph of contiguous tensors as the extension takes it."""
    shared = correlation.dim() == 2
    return (
        *word_mask.shape, emotions, address(word_mask), address(emotion_mask), address(word_weight),
        address(emotion_weight), address(correlation), 0 if shared else emotions * emotions,
    )  # fmt: skip
