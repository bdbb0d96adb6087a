"""The training objective (Eqs. 11, 17, 18, 19)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Losses(NamedTuple):
    """One batch's losses, each averaged over its samples, and what to report of it.

    Attributes:
        total: Eq. 19.
        generation: L_gen (Eq. 17), a sum over a response's words, with label smoothing.
        emotion: L_emo (Eq. 11).
        correlation: L_eco (Eq. 18).
        nll: summed over the batch's words, without label smoothing; detached.
        tokens: words of the batch's responses, EOS counted.
        correct: samples whose emotion was predicted.
        health: what tells a sick model early; empty unless asked for.
    """

    total: Tensor
    generation: Tensor
    emotion: Tensor
    correlation: Tensor
    nll: Tensor
    tokens: Tensor
    correct: Tensor
    health: dict[str, Tensor]


def token_losses(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Smoothed and plain negative log-likelihood of every word: logits [T, V], targets [T] -> two [T]."""
    log_probability = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    nll = -log_probability.gather(1, targets[:, None])[:, 0]
    smoothed = (1.0 - label_smoothing) * nll - label_smoothing * log_probability.mean(-1)
    return smoothed, nll


def correlation_loss(weight: Tensor, relevant: Tensor) -> Tensor:
    """L_eco (Eq. 18): minus the correlation of all pairs of relevant emotions over their number, batch average.

    Args:
        weight: [P, P], of the pair i < j in row i, column j (:meth:`Correlation.pair_weight`).
        relevant: [B, P] bool, V'. A set of one emotion has no pair and gives 0.

    Returns:
        scalar.
    """
    chosen = relevant.to(weight.dtype)
    # Not a matrix product: under autocast that would round the correlations.
    pairs = (chosen[:, :, None] * chosen[:, None] * weight.triu(1)).sum((1, 2))
    return -(pairs / chosen.sum(1).clamp(min=1.0)).mean()
