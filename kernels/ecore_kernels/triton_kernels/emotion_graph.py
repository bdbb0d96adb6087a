"""The emotion graph as kernel arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def graph_arguments(
    word_mask: Tensor,
    correlation: Tensor,
    emotion_mask: Tensor | None,
    row_factor: Tensor | None,
    number: torch.dtype,
) -> dict[str, Any]:
    """Return masks [B, K, M] and [B, P], correlation [P, P] or [B, P, P], row factor, and their sizes.

    Args:
        number: type of correlation and row factor in the kernels.
    """
    _, resolutions, words = word_mask.shape
    emotions = correlation.shape[-1]
    return {
        "word_mask": word_mask.contiguous(),
        "correlation": correlation.to(number).contiguous(),
        "emotion_mask": None if emotion_mask is None else emotion_mask.contiguous(),
        "row_factor": None if row_factor is None else row_factor.to(number).contiguous(),
        "resolutions": resolutions,
        "words": words,
        "emotions": emotions,
        "correlation_batch": 0 if correlation.dim() == 2 else emotions * emotions,
    }
