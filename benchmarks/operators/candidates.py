"""The candidates of the operators' benchmark, and the meaning of "the same work".

Every candidate gets the same tensors and gives the same outputs; backward, gradients reach the same leaves:
query, key, value, every earlier query, key, gate and edge scale, the emotions' weights and their correlation
(edge_attention: the edges instead). Upstream gradients are given, leaves' gradients are returned and not
accumulated. Candidates:

* ``fused``: this package's fastest kernels on the device: ``triton`` on CUDA, ``native`` on CPU.
* ``reference``: the package's plain PyTorch, eager.
* ``compiled``: ``torch.compile`` of the reference (fullgraph, static shapes, default mode). Its first call's
  time is reported.
* ``flex``: FlexAttention, compiled, its score multiplied by a dense tensor of edge weights, with a block mask
  of who neighbours whom. In its favour: the mask is made outside the timed region and not counted in its memory;
  so are, without history, the dense edges, whose gradient then ends there instead of at emotion weights and
  correlation (the check carries it on, untimed). With history it has to compute the edges from the earlier
  queries, keys, gates and the graph, in PyTorch, compiled too. It cannot return scores, so it neither reads edges
  out nor updates them; it has no backward on CPU; on CUDA the edges' gradient goes through atomics, so it is not
  the same bits every run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.command_line import FUSED_BACKEND
from benchmarks.operators import problems
from benchmarks.operators.problems import Problem
from ecore_kernels.operators.history import row_factor

NAMES = ("fused", "reference", "compiled", "flex")
# float32 [B, K, N, N] tensors that a candidate has at once, forward and with backward: a guard against filling
# a CPU's memory, whose shortage no exception tells.
DENSE_TENSORS = {"reference": (6, 14), "compiled": (4, 8), "flex": (3, 5)}


class UnsupportedError(Exception):
    """A candidate cannot run a call; the message says why."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a problem.

    Attributes:
        operation: tensors to outputs: what is timed.
        leaves: names of the tensors that get gradients in the timed backward.
        prepare: adds to a call's tensors what the operation may have for free, outside the timed region.
        finish: from the tensors and the leaves' gradients, the gradients that the problem asks for; untimed.
    """

    operation: Callable[[dict[str, Any]], tuple[Tensor, ...]]
    leaves: tuple[str, ...]
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda tensors: tensors
    finish: Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Tensor]] = lambda _, gradients: gradients


def build(name: str, problem: Problem, device: str, backward: bool) -> Candidate:
    """The candidate of that name.

    Raises:
        UnsupportedError: it cannot run the problem.
    """
    if device == "cpu" and name in DENSE_TENSORS and problem.operator != "edge_readout":
        needed = DENSE_TENSORS[name][backward] * problem.dense_bytes
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > 0.7 * free:
            raise UnsupportedError(f"needs about {needed >> 30} GiB of memory, {free >> 30} GiB are free")
    if name == "fused":
        backend = FUSED_BACKEND[device]
        return Candidate(lambda tensors: problems.call(problem, tensors, backend), problem.leaves)
    if name == "reference":
        return Candidate(lambda tensors: problems.call(problem, tensors, "reference"), problem.leaves)
    if name == "compiled":

        def reference(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return problems.plain(problem, tensors)

        return Candidate(torch.compile(reference, fullgraph=True, dynamic=False), problem.leaves)
    return _flex(problem, device, backward)


def _flex(problem: Problem, device: str, backward: bool) -> Candidate:
    if problem.operator == "edge_readout" or (problem.operator == "edge_attention" and problem.depth):
        raise UnsupportedError("returns no scores: it can neither update edges nor read them out")
    if backward and device == "cpu":
        raise UnsupportedError("has no backward on CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    past = problem.operator == "graph_attention" and problem.depth > 0

    def prepare(tensors: dict[str, Any]) -> dict[str, Any]:
        if problem.operator == "edge_attention":
            edge, neighbors = tensors["edge"], tensors["neighbors"]
        else:
            edge, neighbors = problems.graph_of(tensors).dense()

        def hears(batch: Tensor, head: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
            return neighbors[batch, head, receiver, sender]

        size = (problem.batch, problem.resolutions, problem.nodes, problem.nodes)
        mask = create_block_mask(hears, *size, device=device)
        return tensors | {"mask": mask} | ({} if past else {"edge": edge})

    def edges(tensors: dict[str, Any]) -> Tensor:
        edge, _ = problems.graph_of(tensors).dense()
        history = problems.history_of(problem, tensors)
        for update in history:
            edge = edge * (1.0 + problem.scale * (update.query @ update.key.mT).float())
        factor = row_factor(history)  # [B, K, N]
        return edge if factor is None else edge * factor[..., None]

    def attend(tensors: dict[str, Any], edge: Tensor) -> tuple[Tensor, ...]:
        def weigh(score: Tensor, batch: Tensor, head: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
            return score * edge[batch, head, receiver, sender]

        nodes = tensors["query"], tensors["key"], tensors["value"]
        return (flex_attention(*nodes, score_mod=weigh, block_mask=tensors["mask"], scale=problem.scale),)

    def finish(tensors: dict[str, Any], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        gradients = dict(gradients)
        names = ("emotion_weight", "correlation")
        with torch.enable_grad():
            graph = problems.asking(
                {name: tensors[name] for name in (*names, "word_weight", "word_mask")}, names
            )
            edge, _ = problems.graph_of(graph).dense()
            carried = torch.autograd.grad(edge, [graph[name] for name in names], gradients.pop("edge"))
        return gradients | dict(zip(names, carried, strict=True))

    attend = torch.compile(attend, fullgraph=True, dynamic=False)
    if past:
        # A graph of their own: FlexAttention's lowering wants what its score function reads to be in memory.
        edges = torch.compile(edges, fullgraph=True, dynamic=False)
        return Candidate(lambda tensors: attend(tensors, edges(tensors)), problem.leaves, prepare)

    def operation(tensors: dict[str, Any]) -> tuple[Tensor, ...]:
        return attend(tensors, tensors["edge"])

    if problem.operator == "edge_attention":
        return Candidate(operation, problem.leaves, prepare)
    return Candidate(operation, ("query", "key", "value", "edge"), prepare, finish)


def outputs_and_gradients(
    candidate: Candidate, tensors: dict[str, Any], sent: list[Tensor], backward: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A call's outputs and the gradients of the problem's leaves, for the oracle."""
    tensors = candidate.prepare(tensors)
    if not backward:
        return list(candidate.operation(tensors)), {}
    asking = problems.asking(tensors, candidate.leaves)
    outputs = candidate.operation(asking)
    gradients = torch.autograd.grad(outputs, [asking[name] for name in candidate.leaves], sent)
    named = candidate.finish(tensors, dict(zip(candidate.leaves, gradients, strict=True)))
    return [output.detach() for output in outputs], named


def timed_call(candidate: Candidate, sets: list[dict[str, Any]], backward: bool) -> Callable[[int], object]:
    """The call to time on prepared input sets, in turn by the running number."""
    if not backward:
        return lambda number: candidate.operation(sets[number % len(sets)])
    ready = []
    for tensors in sets:
        asking = problems.asking(tensors, candidate.leaves)
        ready.append((asking, [asking[name] for name in candidate.leaves], problems.upstream(tensors)))

    def run(number: int) -> object:
        tensors, leaves, sent = ready[number % len(ready)]
        return torch.autograd.grad(candidate.operation(tensors), leaves, sent)

    return run
