"""The training objective (Eqs. 11, 17, 18, 19)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ecore.data.vocabulary import PAD
from ecore.model.pointer import Copying
from ecore_kernels.operators.linear_cross_entropy import scaled_losses


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
        health: early signs of a model that fails to learn; empty unless requested.
    """

    total: Tensor
    generation: Tensor
    emotion: Tensor
    correlation: Tensor
    nll: Tensor
    tokens: Tensor
    correct: Tensor
    health: dict[str, Tensor]


def vocabulary_losses(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    copying: Copying | None = None,
) -> tuple[Tensor, Tensor]:
    """Output layer and cross entropy in one (Eqs. 16, 17), without the logits of all words at once.

    Args:
        states: [T, D], s_t of Eq. 15.
        weight: [V, D], W_s.
        bias: [V].
        targets: int64 [T]; where it is PAD, all is 0.
        label_smoothing: share of the target's probability that is spread evenly over the vocabulary.
        scale: factor on the smoothed loss; applied later it would be a pass over the weight's gradient.
        copying: makes it the loss of the mixture of generating and copying (:mod:`ecore.model.pointer`), [T].

    Returns:
        The smoothed loss, summed over the words and scaled, scalar; and the plain negative log-likelihood of each
        word, [T], which has no gradient. Both float32 at least.
    """
    return scaled_losses(
        states,
        weight,
        bias,
        targets,
        label_smoothing=label_smoothing,
        ignore_index=PAD,
        reduction="sum",
        scale=scale,
        copies=None if copying is None else (copying.gate, copying.scores, *copying.context),
    )


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
    return (pairs / -chosen.sum(1).clamp(min=1.0)).mean()


def ranked_pairs_loss(weight: Tensor, emotion_attention: Tensor, most: int) -> Tensor:
    """L_eco of the released form: minus the correlation of all pairs of the top emotions, batch average.

    The sum is not divided by their number, and a pair's weight is that of the emotion with more attention (row) to the
    other one (column): Softmax(R) is not symmetric.

    Args:
        weight: [P, P] (:meth:`Correlation.pair_weight`).
        emotion_attention: [B, P], h_emo.
        most: how many emotions are the top ones.

    Returns:
        scalar.
    """
    top = emotion_attention.topk(
        min(most, emotion_attention.shape[1]), dim=1
    ).indices  # [B, T], by falling attention
    pairs = weight[top[:, :, None], top[:, None]].triu(1)  # [B, T, T]
    return -pairs.sum((1, 2)).mean()


def prior_loss(correlation: Tensor, counts: Tensor) -> Tensor:
    """Return the cross entropy from the counts of co-occurrence to R, both over the other emotions; scalar.

    With n_ij the dialogues in which emotions i and j occur and p_ij = n_ij / sum_k n_ik, the mean over emotions i of
    -sum_j p_ij log Softmax_{j != i}(R_i)_j. R_ij = log n_ij makes it least: as n is symmetric, so is that R. An emotion
    that occurs with no other counts nothing.

    Args:
        correlation: R, [P, P].
        counts: n, [P, P] with a diagonal of 0.
    """
    own = torch.eye(len(counts), dtype=torch.bool, device=counts.device)
    total = counts.sum(1, keepdim=True)  # [P, 1]
    share = counts / total.clamp(min=1.0)
    log_share = correlation.float().masked_fill(own, -torch.inf).log_softmax(-1)
    terms = torch.where(own | (total == 0), 0.0, share * log_share.masked_fill(own, 0.0))
    return -terms.sum() / (total > 0).sum().clamp(min=1)
