"""Output layer and cross entropy, a chunk of rows at a time, with loss and gradients together.

For a chunk there is a matrix product that gives its logits, two passes over them, and a product for each gradient.
Products are torch's on every backend. The passes are here in PyTorch; the other backends have their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ecore_kernels.copying import mixture
from ecore_kernels.label_smoothing import Goal, goal_of

CHUNK = 192
"""Rows whose logits exist at once: enough for an efficient matrix product, and 18 MB at 23,714 classes in float32.

Each chunk reads and writes the weight's gradient once more: with 128, calls of 190 and 300 rows took 1.19 and 1.11
times as long on a Xeon.
"""


class Sums(NamedTuple):
    """Sums over rows of logits, each [n, 1]; softmax = exp(logits - maximum) * inverse.

    Attributes:
        inverse: one over the sum of exp(logits - maximum).
        mean: of the logits of the classes that smoothing is spread over; None without smoothing.
    """

    maximum: Tensor
    inverse: Tensor
    mean: Tensor | None


class Passes(Protocol):
    """A backend's two passes over the logits of a chunk, [n, V] contiguous."""

    def adds(self, kind: torch.dtype, exact: torch.dtype) -> bool:
        """Return whether :meth:`sums` adds the bias to logits of type ``kind``; else the product begins with it."""
        ...

    def sums(
        self, logits: Tensor, offset: Tensor | None, goal: Goal, exact: torch.dtype
    ) -> tuple[Tensor, Sums]:
        """Return a tensor for :meth:`errors`, which may be the logits themselves, and the sums in type ``exact``.

        Args:
            logits: [n, V], without ``offset``, which is then added to them in place.
            offset: [V], where :meth:`adds` says so; else None.
        """
        ...

    def errors(self, work: Tensor, sums: Sums, factor: Tensor, target: Tensor, goal: Goal) -> Tensor:
        """Return factor * softmax - goal, [n, V]; ``work`` is overwritten.

        Args:
            work: what :meth:`sums` returned.
            factor: [n, 1].
            target: [n, 1] int64, in 0 ... V - 1.
        """
        ...


class InPyTorch:
    """The passes in PyTorch."""

    def adds(self, kind: torch.dtype, exact: torch.dtype) -> bool:
        return False

    def sums(
        self, logits: Tensor, offset: Tensor | None, goal: Goal, exact: torch.dtype
    ) -> tuple[Tensor, Sums]:
        logits = logits.to(exact)
        probability = logits.softmax(1)
        mean = None
        if goal.base:
            spread = logits.sum(1, keepdim=True)
            if goal.hole >= 0:
                before, behind = logits[:, : goal.hole], logits[:, goal.hole + 1 :]
                spread = before.sum(1, keepdim=True) + behind.sum(1, keepdim=True)
            mean = spread / goal.spread
        # The largest probability is one over the sum: 1 / V at least.
        return probability, Sums(logits.amax(1, keepdim=True), probability.amax(1, keepdim=True), mean)

    def errors(self, work: Tensor, sums: Sums, factor: Tensor, target: Tensor, goal: Goal) -> Tensor:
        error = work.mul_(factor)
        if goal.hole >= 0:
            error[:, : goal.hole] -= goal.base
            error[:, goal.hole + 1 :] -= goal.base
        elif goal.base:
            error -= goal.base
        return error.scatter_add_(1, target, torch.full_like(factor, -goal.extra))


def run(
    passes: Passes,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scores: Tensor | None,
    target: Tensor,
    classes: Tensor | None,
    slots: Tensor | None,
    label_smoothing: float,
    smoothing_classes: int | None,
    ignore_index: int,
    scale: float,
    mean: bool,
    needs: Sequence[bool],
    kind: torch.dtype,
    results: Sequence[Tensor],
) -> None:
    """Compute the losses, and the gradients that are needed, by a backend's passes.

    Arguments and results are those of ``_results`` in :mod:`ecore_kernels.operators.linear_cross_entropy`.

    Raises:
        ValueError: a target out of range, on a CPU. On a GPU, where the check would synchronise, the row's loss is NaN.
    """
    loss, nll, *gradients = results
    grad_hidden, grad_weight, grad_bias, grad_gate, grad_scores = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    rows, exact = len(hidden), nll.dtype
    goal = goal_of(len(weight), label_smoothing, smoothing_classes, ignore_index)
    counted, possible = target != ignore_index, (target >= 0) & (target < len(weight))
    if target.device.type == "cpu":
        check_targets(target, counted & ~possible, len(weight), ignore_index)
    count = counted.sum()
    weighting = scale * counted.to(exact)  # [T], what a row's gradient is multiplied by
    if mean:
        weighting = weighting / count.clamp(min=1)
    column = target.clamp(0, len(weight) - 1)[:, None]
    matrix, offset = weight.to(kind), None if bias is None else bias.to(kind)
    added, offset = (offset, None) if passes.adds(kind, exact) else (None, offset)  # [V], each
    smoothed = torch.empty_like(nll)
    # Sums over chunks are kept in float32 at least, and so are gradients of 16 bits until the end.
    sum_weight, sum_bias = (
        None if x is None else x if x.dtype.itemsize > 2 else x.new_empty(x.shape, dtype=exact)
        for x in (grad_weight, grad_bias)
    )
    size = chunk_size(rows, kind)
    for begin in range(0, rows, size):
        part = slice(begin, begin + size)
        inputs, places = hidden[part].to(kind), column[part]  # [n, D], [n, 1]
        # [n, V]; a product that begins with a bias copies it into every row first.
        logits = inputs @ matrix.mT if offset is None else torch.addmm(offset, inputs, matrix.mT)
        work, sums = passes.sums(logits, added, goal, exact)
        log_sum = -sums.inverse.log()  # of exp(logits - maximum)
        of_target = sums.maximum - logits.gather(1, places).to(exact) + log_sum
        of_target = of_target.where(possible[part, None], torch.nan)
        of_row = (1.0 - label_smoothing) * of_target
        if sums.mean is not None:
            of_row = (goal.extra * of_target) + goal.base * goal.spread * (sums.maximum - sums.mean + log_sum)
        factor = torch.full_like(of_row, goal.mass)
        copies = None
        if gate is not None and scores is not None and classes is not None and slots is not None:
            log_softmax = logits.gather(1, classes[part]).to(exact) - sums.maximum - log_sum
            of_places = classes[part], slots[part]
            copies = mixture(gate[part, None], scores[part], *of_places, log_softmax, places, goal)
            of_row, of_target = of_row + copies.loss, of_target + copies.nll
            factor = goal.mass - copies.moved.sum(1, keepdim=True)
        counts = counted[part, None]
        smoothed[part] = of_row.where(counts, 0.0)[:, 0]
        nll[part] = of_target.where(counts, 0.0)[:, 0]
        if not any(needs):
            continue
        weights = weighting[part, None]
        if copies is not None and grad_gate is not None:
            grad_gate[part] = (copies.gate_error * weights)[:, 0]
        if copies is not None and grad_scores is not None:
            grad_scores[part] = copies.scores_error * weights
        if not any(needs[:3]):
            continue
        error = passes.errors(work, sums, factor, places, goal)
        if copies is not None and classes is not None:
            error.scatter_add_(1, classes[part], copies.moved.to(error.dtype))
        error, weights = error.to(kind), weights.to(kind)
        if grad_hidden is not None:
            grad_hidden[part] = (error @ matrix) * weights
        if sum_weight is not None:
            add_product(sum_weight, error.mT, inputs * weights, first=begin == 0)
        if sum_bias is not None:
            add_product(sum_bias, error.mT, weights[:, 0], first=begin == 0)
    total = scale * smoothed.sum()
    loss.copy_(total / count if mean else total)
    for gradient, found in ((grad_weight, sum_weight), (grad_bias, sum_bias)):
        if gradient is not None and found is not None and found is not gradient:
            gradient.copy_(found)
        if gradient is not None and not rows:  # there was no first chunk to write it
            gradient.zero_()


def forward(*arguments: Any) -> None:
    """Compute the losses, and the gradients that are needed; arguments as in :func:`run`."""
    run(InPyTorch(), *arguments)


def check_targets(target: Tensor, bad: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for the first row that ``bad`` [T] marks."""
    if bool(bad.any()):
        row = int(bad.to(torch.int8).argmax())
        raise ValueError(
            f"linear_cross_entropy: target: expected 0 to {classes - 1} or ignore_index ({ignore_index}), "
            f"got {int(target[row])} in row {row}"
        )


def chunk_size(rows: int, kind: torch.dtype) -> int:
    """A size that cuts ``rows`` into equal parts of at most :data:`CHUNK`.

    In low precision there are few sizes, and the last part may be smaller: a CPU compiles a kernel for each shape.
    """
    size = max(1, math.ceil(rows / max(1, math.ceil(rows / CHUNK))))
    return min(CHUNK, math.ceil(size / 32) * 32) if kind.itemsize == 2 else size


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b; a low-precision product is summed in the total's own precision."""
    if total.dtype == a.dtype:
        product = total.addmm_ if b.ndim == 2 else total.addmv_
        product(a, b, beta=0.0 if first else 1.0)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b
