"""The physical floor of an operator's call: bytes and operations counted, over ceilings measured on this machine.

Counted is what no implementation with these inputs and outputs can avoid: every input that matters read once,
every output written once, and the products of the formulas for pairs of neighbours alone, in one sweep a
direction:

* forward of attention: one product a layer of history and one for the scores (2 d operations a pair), one with
  the values;
* its backward: the scores and the history's again, dO V^T and P^T dO, and two products (to queries and keys) a
  layer of history and for the scores: 3 (1 + depth) + 2 in all;
* the readout: depth products forward and 3 depth backward, for edges that emotions send.

Exponentials, weights and masks are not counted. Rows that take no part need not be read, but their outputs and
gradients are written (zeros).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.operators import problems
from benchmarks.operators.problems import Problem


class Work(NamedTuple):
    """Bytes moved and floating-point operations of one call."""

    bytes: int
    operations: int


class Ceilings(NamedTuple):
    """Bytes and operations a second."""

    bandwidth: float
    arithmetic: float


def pairs(problem: Problem, word_mask: Tensor) -> tuple[int, int, int]:
    """Nodes that take part, pairs of neighbours, and those of them with an emotion as sender: of all b and k."""
    words = word_mask.sum(2) + ~word_mask[:, :, 0]  # [CLS] takes part whatever its slot says
    emotions = problem.emotions
    to_words = words * (words + 1) // 2 + (words - 1) + words * emotions
    to_emotions = emotions * emotions  # [CLS] and every emotion but itself
    from_emotions = words * emotions + emotions * (emotions - 1)
    return int((words + emotions).sum()), int((to_words + to_emotions).sum()), int(from_emotions.sum())


def work(problem: Problem, tensors: dict[str, Tensor], backward: bool) -> Work:
    """Count what a call has to move and to compute: forward, or forward and backward."""
    taking_part, neighbors, from_emotions = pairs(problem, tensors["word_mask"])
    nodes = problem.batch * problem.resolutions * problem.nodes
    dim, depth = problem.dim, problem.depth
    size = problem.dtype.itemsize
    read, written = taking_part * dim * size, nodes * dim * size  # one tensor [B, K, N, d]
    small = sum(
        tensors[name].nbytes
        for name in ("word_weight", "word_mask", "emotion_weight", "correlation")
        if problem.operator != "edge_attention"
    )
    factor = 4 * taking_part  # one float32 a row: gates
    if problem.operator == "edge_readout":
        emotions = problem.batch * problem.resolutions * problem.emotions
        outputs = sum(x.nbytes for x in problems.upstream(tensors))
        inputs = depth * (read + emotions * dim * size + factor) + small
        forward = Work(inputs + outputs, 2 * dim * depth * from_emotions)
        again = Work(
            inputs + outputs + depth * (2 * written + 4 * nodes) + small, 3 * 2 * dim * depth * from_emotions
        )
    elif problem.operator == "edge_attention":
        dense = nodes * problem.nodes
        # Edges are needed where there are neighbours alone; who is one has to be read in full.
        inputs = 3 * read + dense + 4 * neighbors + depth * factor
        forward = Work(inputs + written + 4 * depth * dense, 2 * dim * 2 * neighbors)
        again = Work(
            inputs + 2 * read + depth * (4 * neighbors + 4 * nodes) + 3 * written + 4 * dense,
            2 * dim * 5 * neighbors,
        )
    else:
        inputs = (3 + 2 * depth) * read + small + depth * factor
        forward = Work(inputs + written, 2 * dim * (2 + depth) * neighbors)
        again = Work(
            inputs + 2 * read + (3 + 2 * depth) * written + depth * 4 * nodes + small,
            2 * dim * (3 * (1 + depth) + 2) * neighbors,
        )
    if not backward:
        return forward
    return Work(forward.bytes + again.bytes, forward.operations + again.operations)


def floor(counted: Work, ceilings: Ceilings) -> tuple[float, str]:
    """Seconds that a call takes at least, and what bounds it."""
    moving, computing = counted.bytes / ceilings.bandwidth, counted.operations / ceilings.arithmetic
    return max(moving, computing), "memory" if moving >= computing else "arithmetic"


def _rate(call: Callable[[], object], device: str, amount: float) -> float:
    """The best measurement of amount a second within a second, of a dozen at least: a ceiling."""
    best, began, number = 0.0, time.perf_counter(), 0
    while number < 12 or time.perf_counter() - began < 1.0:
        number += 1
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, amount / (time.perf_counter() - start))
    return best


def _bandwidth(device: str) -> float:
    """Of a large copy, bytes read and bytes written both counted."""
    source = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), device, 2 * source.nbytes)


def _arithmetic(device: str, precision: str) -> float:
    """Of a large product of matrices, on random numbers."""
    side = 8192 if device == "cuda" else 1024
    problems.set_precision(precision)
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left, right = torch.randn(2, side, side, device=device).to(kind)
    result = torch.empty_like(left)
    return _rate(lambda: torch.mm(left, right, out=result), device, 2 * side**3)


@functools.cache
def ceilings(device: str, precision: str) -> Ceilings:
    """The highest rates that this machine reaches."""
    return Ceilings(_bandwidth(device), _arithmetic(device, precision))
