"""The training objective (Eqs. 11, 17, 18, 19)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecore.data.vocabulary import PAD
from ecore.model.pointer import Copyable, Copying, copied


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


CHUNK = 128
"""Words whose logits exist at once: enough to keep a matrix product busy, and 12 MB at 23,714 words of vocabulary."""


@torch.compiler.disable  # chunked by hand: traced, it would be compiled anew for every number of words
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

    ``log_softmax(states @ weight.T + bias)`` is made :data:`CHUNK` words at a time. Where a gradient is wanted,
    each chunk's is computed while its logits are there, so backward only scales it: three matrix products, none
    of them twice. (torch's ``linear_cross_entropy`` does this without label smoothing and does not tell the
    unsmoothed loss.)

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
        word, [T], which has no gradient. Both float32 at least. First derivatives only.
    """
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    gate, scores, context = copying or (None, None, None)
    words, slots = context or (None, None)
    return _VocabularyLosses.apply(
        states, weight, bias, gate, scores, targets, words, slots, label_smoothing, scale, dtype
    )


class _VocabularyLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor | None,
        scores: Tensor | None,
        targets: Tensor,
        words: Tensor | None,
        slots: Tensor | None,
        label_smoothing: float,
        scale: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[:5]
        with torch.autocast(states.device.type, enabled=False):
            matrix, offset = weight.to(dtype), bias.to(dtype)
            counted = targets != PAD
            smooth = label_smoothing / len(weight)
            exact = torch.promote_types(dtype, torch.float32)
            losses, plain = [], []
            # Of a batch without words there is no first chunk to write them.
            make = torch.empty_like if len(states) else torch.zeros_like
            inputs: tuple[Any, ...] = (states, weight, bias, gate, scores)
            # Any: which are None, ``needed`` says.
            grads: list[Any] = [make(x) if n else None for x, n in zip(inputs, needed, strict=True)]
            size = _chunk(len(states), dtype)
            for begin in range(0, len(states), size):
                part = slice(begin, begin + size)
                hidden, target, count = states[part].to(dtype), targets[part, None], counted[part, None]
                logits = torch.addmm(offset, hidden, matrix.mT).to(exact)
                probability = logits.softmax(1)
                # From the largest probability, which is at least 1 / V: no logarithm of nearly nothing.
                normalizer = logits.amax(1, keepdim=True) - probability.amax(1, keepdim=True).log()
                nll = torch.where(count, normalizer - logits.gather(1, target), 0.0)
                loss = (1.0 - label_smoothing) * nll
                if label_smoothing:
                    spread = torch.where(count, normalizer - logits.mean(1, keepdim=True), 0.0)
                    loss = loss + label_smoothing * spread
                if gate is not None and scores is not None and words is not None and slots is not None:
                    at_slots = Copying(gate[part, None], scores[part], Copyable(words[part], slots[part]))
                    mixture = _mixture(at_slots, logits, normalizer, target, label_smoothing)
                    loss = loss + torch.where(count, mixture.loss, 0.0)
                    nll = nll + torch.where(count, mixture.nll, 0.0)
                losses.append(loss)
                plain.append(nll)
                if not any(needed):
                    continue
                error = probability
                if gate is not None and words is not None:
                    error = error.mul_(1.0 - mixture.moved.sum(1, keepdim=True))
                    error = error.scatter_add_(1, words[part], mixture.moved)
                    if needed[3]:
                        grads[3][part] = (mixture.gate_error * (scale * count))[:, 0]
                    if needed[4]:
                        grads[4][part] = mixture.scores_error * (scale * count)
                error = error.sub_(smooth) if label_smoothing else error
                error = error.scatter_add_(1, target, torch.full_like(nll, label_smoothing - 1.0)).to(dtype)
                weighting = (scale * count).to(dtype)
                if needed[0]:
                    grads[0][part] = (error @ matrix) * weighting
                if needed[1]:
                    _add_product(grads[1], error.mT, hidden * weighting, first=begin == 0)
                if needed[2]:
                    _add_product(grads[2], error.mT, weighting[:, 0], first=begin == 0)
        ctx.grads = grads
        nll = torch.cat(plain)[:, 0] if plain else states.new_zeros(0, dtype=exact)
        ctx.mark_non_differentiable(nll)
        return scale * (torch.cat(losses).sum() if losses else nll.sum()), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "vocabulary_losses: its gradient was taken already; it keeps it for one backward pass"
            )
        # On a CPU the look is free, and spares a pass over a gradient as large as the vocabulary's table.
        if grad.device.type != "cpu" or grad.item() != 1.0:
            for one in grads:
                if one is not None:
                    one *= grad
        return (*grads, None, None, None, None, None, None)


class _Mixture(NamedTuple):
    """Terms that copying adds to the smoothed and the plain loss, each [n, 1], and to the errors.

    With t the smoothed target and s_w the chance that w, if said, was generated, the loss is
    -sum t log P = -sum t log softmax(logits) - log p + sum t log s, and s is 1 outside of the context:
    all that is new happens at the context's slots.

    Attributes:
        moved: [n, S], t (1 - s) at slots: what the logits no longer answer for.
        gate_error: [n, 1], the loss's derivative by the gate.
        scores_error: [n, S], by the scores.
    """

    loss: Tensor
    nll: Tensor
    moved: Tensor
    gate_error: Tensor
    scores_error: Tensor


def _mixture(
    copying: Copying, logits: Tensor, normalizer: Tensor, target: Tensor, label_smoothing: float
) -> _Mixture:
    """Of n response words: gate [n, 1], logits [n, V], normalizer and target [n, 1]."""
    gate, words = copying.gate.to(logits.dtype), copying.context.words
    attention, sums = copied(copying)
    # log of p softmax(logits)_w over (1 - p) sums_w; infinite where nothing is copied.
    odds = gate + logits.gather(1, words) - normalizer - sums.log()
    log_generated = F.logsigmoid(odds)
    right = (words == target).to(logits.dtype)
    goal = (1.0 - label_smoothing) * right + label_smoothing / logits.shape[1]
    moved = goal * torch.sigmoid(-odds)
    total = moved.sum(1, keepdim=True)
    share = attention / sums.gather(1, copying.context.slots).clamp(min=torch.finfo(sums.dtype).tiny)
    return _Mixture(
        loss=(goal * log_generated).sum(1, keepdim=True) - F.logsigmoid(gate),
        nll=(right * log_generated).sum(1, keepdim=True) - F.logsigmoid(gate),
        moved=moved,
        gate_error=torch.sigmoid(gate) - 1.0 + total,
        scores_error=attention * total - share * moved.gather(1, copying.context.slots),
    )


def _chunk(words: int, dtype: torch.dtype) -> int:
    """A size that cuts ``words`` into equal parts of at most :data:`CHUNK`.

    In low precision there are few sizes, and the last part may be smaller: a CPU compiles a kernel for each shape.
    """
    size = max(1, math.ceil(words / max(1, math.ceil(words / CHUNK))))
    return min(CHUNK, math.ceil(size / 32) * 32) if dtype.itemsize == 2 else size


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b; a low-precision product is summed in the total's own precision."""
    if total.dtype == a.dtype:
        product = total.addmm_ if b.ndim == 2 else total.addmv_
        product(a, b, beta=0.0 if first else 1.0)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


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
