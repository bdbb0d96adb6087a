"""Copying together with a cross entropy: the pointer-generator (See et al., 2017, Eqs. 8 and 9).

    P(w) = p softmax(logits)_w + (1 - p) sum of a_i over the places i that hold class w

``p = sigmoid(gate)`` is the probability that a class is generated and not copied; ``a`` is a softmax over places. The
places of each class are summed first, and the sum is kept at the class's first place, its *slot*. So P differs from p
softmax(logits) at slots only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ecore_kernels.label_smoothing import Goal


def copied(scores: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The attention to places, and its sums by class.

    Args:
        scores: [..., S], logits of a; minus infinity at places that cannot be copied.
        slots: [..., S] int64, the slot of each place.

    Returns:
        a [..., S], which is 0 in a row without anything to copy; and its sums by class [..., S], at slots and 0
        elsewhere. Both are float32 at least.
    """
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    attention = exact.softmax(-1).nan_to_num()
    return attention, torch.zeros_like(attention).scatter_add(-1, slots, attention)


def mixed(logits: Tensor, gate: Tensor, scores: Tensor, classes: Tensor, slots: Tensor) -> Tensor:
    """log P [n, V] of the mixture; differentiable.

    Args:
        logits: [n, V], of the generated class.
        gate: [n], p's logit; infinite where there is nothing to copy.
        scores: [n, S], see :func:`copied`.
        classes, slots: [n, S] int64: the class at each place, and its slot.
    """
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))[:, None]
    generated = logits.to(torch.promote_types(logits.dtype, gate.dtype)).log_softmax(-1) + F.logsigmoid(gate)
    _, sums = copied(scores, slots)
    present = sums > 0.0
    # In rows without copying the logarithm and its gradient would not be finite.
    ratio = torch.where(present, sums, 1.0).log() + F.logsigmoid(-gate) - generated.gather(1, classes)
    more = torch.where(present, F.softplus(torch.where(present, ratio, 0.0)), 0.0)
    return generated.scatter_add(1, classes, more.to(generated.dtype))


class Mixture(NamedTuple):
    """Terms that copying adds to the smoothed and the plain loss, both [n, 1], and to the errors.

    Let t be the target distribution and s_w the probability that w, if it is the output, was generated. The loss is
    -sum t log P = -sum t log softmax(logits) - log p sum t + sum t log s, and s is 1 for classes without a place: so
    copying changes terms at slots only.

    Attributes:
        moved: [n, S], t (1 - s) at slots: the part of the target that copying takes from the logits.
        gate_error: [n, 1], the derivative of the loss by the gate.
        scores_error: [n, S], the derivative of the loss by the scores.
    """

    loss: Tensor
    nll: Tensor
    moved: Tensor
    gate_error: Tensor
    scores_error: Tensor


def mixture(
    gate: Tensor,
    scores: Tensor,
    classes: Tensor,
    slots: Tensor,
    log_softmax: Tensor,
    target: Tensor,
    goal: Goal,
) -> Mixture:
    """The :class:`Mixture` of n rows.

    Args:
        gate: [n, 1], p's logit; infinite where there is nothing to copy.
        scores: [n, S], see :func:`copied`.
        classes, slots: [n, S] int64: the class at each place, and its slot.
        log_softmax: [n, S], of the logits, at ``classes``.
        target: [n, 1].
    """
    gate = gate.to(log_softmax.dtype)
    attention, sums = copied(scores, slots)
    # log of p softmax(logits)_w over (1 - p) sums_w; infinite where nothing is copied.
    odds = gate + log_softmax - sums.log()
    log_generated = F.logsigmoid(odds)
    right = (classes == target).to(log_softmax.dtype)
    wanted = goal.extra * right + goal.base * (classes != goal.hole)
    moved = wanted * torch.sigmoid(-odds)
    total = moved.sum(1, keepdim=True)
    share = attention / sums.gather(1, slots).clamp(min=torch.finfo(sums.dtype).tiny)
    return Mixture(
        loss=(wanted * log_generated).sum(1, keepdim=True) - goal.mass * F.logsigmoid(gate),
        nll=(right * log_generated).sum(1, keepdim=True) - F.logsigmoid(gate),
        moved=moved,
        gate_error=goal.mass * (torch.sigmoid(gate) - 1.0) + total,
        scores_error=attention * total - share * moved.gather(1, slots),
    )
