"""The benchmarks' problems: calls of :mod:`ecore_kernels.problems`, sets of them to rotate among, a float64 oracle."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ecore_kernels import problems, reference
from ecore_kernels.operators.history import row_factor
from ecore_kernels.problems import (
    MASKS,
    PRECISIONS,
    asking,
    call,
    draw,
    draw_graph,
    draw_lengths,
    graph_of,
    history_of,
    set_precision,
    upstream,
)

__all__ = [
    "DIRECTIONS",
    "LIMITS",
    "MASKS",
    "OPERATORS",
    "PRECISIONS",
    "Oracle",
    "Problem",
    "asking",
    "call",
    "draw",
    "draw_graph",
    "draw_lengths",
    "draw_sets",
    "graph_of",
    "history_of",
    "oracle",
    "plain",
    "relative_error",
    "set_precision",
    "upstream",
]

OPERATORS = ("graph_attention", "edge_readout", "edge_attention")
DIRECTIONS = ("forward", "forward+backward")

# From this many nodes on the oracle judges some receivers only: float64 N x N tensors would not fit.
LARGEST_FULL_CHECK = 2048
RECEIVERS_CHECKED = 192
INPUT_BYTES = 2**28  # to rotate among: more than a last-level cache holds
MOST_SETS = {"cpu": 8, "cuda": 32}
# Largest relative error that a right answer has, in the Frobenius norm; a tenfold of it, relative to the
# largest element, for the worst element.
LIMITS = {"ieee": 2e-5, "tf32": 5e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Problem(problems.Problem):
    """One call of an operator, and how wrong its answer may be."""

    def allows(self, errors: tuple[float, float]) -> bool:
        """Return whether an answer that is off by so much, in norm and in its worst element, is right."""
        limit = LIMITS[self.precision]
        return errors[0] <= limit and errors[1] <= 10 * limit


def draw_sets(problem: Problem, device: str) -> list[dict[str, Tensor]]:
    """Two sets of tensors or more, to rotate among: together more than a last-level cache holds, where so many do."""
    first = draw(problem, 0, device)
    size = sum(x.nbytes for x in first.values())
    count = max(2, min(MOST_SETS[device], INPUT_BYTES // size))
    return [first, *(draw(problem, seed, device) for seed in range(1, count))]


def plain(problem: Problem, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The reference without the checks and the registration around it: what a compiler sees through."""
    if problem.operator == "edge_attention":
        gate, edge_scale = tensors.get("gate"), tensors.get("edge_scale")
        nodes = tensors["query"], tensors["key"], tensors["value"]
        output, new_edge, _ = reference.edge_attention(
            *nodes, tensors["edge"], tensors["neighbors"], gate, edge_scale, problem.scale
        )
        output = output.to(problem.dtype)
        return (output,) if new_edge is None else (output, new_edge)
    graph, history = graph_of(tensors), history_of(problem, tensors)
    past = [update.query for update in history], [update.key for update in history], row_factor(history)
    if problem.operator == "edge_readout":
        return reference.edge_readout(graph, *past, problem.scale, False)
    nodes = tensors["query"], tensors["key"], tensors["value"]
    return (reference.graph_attention(*nodes, graph, *past, problem.scale, False).to(problem.dtype),)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The right answer, in float64.

    Attributes:
        receivers: the rows that are judged; None for all. upstream: gradients of the outputs to use, 0 in rows
        that are not judged, so that gradients are right in full. outputs: by number, in the judged rows alone.
        gradients: by name; of ``edge`` in the judged rows alone. sums: by name, what a gradient that is one sum
        of many terms is measured by, where they cancel: their norm.
    """

    receivers: Tensor | None
    upstream: list[Tensor]
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    sums: dict[str, float]

    def errors(self, outputs: list[Tensor], gradients: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Relative errors of an answer in the Frobenius norm, and of its worst element, by what they are in."""
        found = {}
        for index, output in enumerate(outputs):
            rows = output if self.receivers is None else output[:, :, self.receivers]
            found[f"output{index}"] = relative_error(rows, self.outputs[index])
        for name, gradient in gradients.items():
            judged = (
                gradient[:, :, self.receivers] if name == "edge" and self.receivers is not None else gradient
            )
            found[f"gradient of {name}"] = relative_error(
                judged, self.gradients[name], self.sums.get(name, 0.0)
            )
        return found


def relative_error(actual: Tensor, exact: Tensor, least: float = 0.0) -> tuple[float, float]:
    """||actual - exact|| / ||exact||, and the same of the largest elements; infinite where something is not finite.

    The divisor is ``least`` at least.
    """
    difference = actual.double() - exact
    if not bool(difference.isfinite().all()):
        return math.inf, math.inf
    errors = []
    for size in (torch.linalg.vector_norm, lambda x: x.abs().max()):
        wanted, got = max(float(size(exact)), least), float(size(difference))
        errors.append(got / wanted if wanted else (math.inf if got else 0.0))
    return errors[0], errors[1]


def oracle(problem: Problem, tensors: dict[str, Tensor], backward: bool) -> Oracle:
    """The right answer in float64: the paper's layer-by-layer recurrence with its edges in memory.

    edge_readout's is the reference in float64: its edges after several layers are N x N. Where N is large, the
    attention operators are judged in some receivers (``[CLS]``, emotions, random words): a receiver's row needs
    no other row.
    """
    receivers = None
    if problem.nodes > LARGEST_FULL_CHECK and problem.operator != "edge_readout":
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(problem.words - 1, generator=generator)[: RECEIVERS_CHECKED - 1] + 1
        emotional = torch.arange(problem.words, problem.nodes)
        receivers = torch.cat([torch.zeros(1, dtype=torch.long), some, emotional]).to(
            tensors["word_mask"].device
        )

    def rows(tensor: Tensor) -> Tensor:
        return tensor if receivers is None else tensor[:, :, receivers]

    # Only its judged rows: all of them in float64 would not fit.
    wide = {name: rows(x) if name in ("edge", "neighbors") else x for name, x in tensors.items()}
    wide = {name: x.double() if x.is_floating_point() else x for name, x in wide.items()}
    leaves = problem.leaves if backward else ()
    wide = asking(wide, leaves)
    if problem.operator == "edge_readout":
        outputs = list(plain(problem, wide))
    else:
        if problem.operator == "edge_attention":
            edge, neighbors = wide["edge"], wide["neighbors"]
        elif receivers is None:
            edge, neighbors = graph_of(wide).dense()
        else:  # dense() only places numbers: nothing is lost in float32
            narrow = {n: x.float() if x.is_floating_point() else x for n, x in wide.items()}
            edge, neighbors = map(rows, graph_of(narrow).dense())
            edge = edge.double()
        for layer in range(problem.depth if problem.operator == "graph_attention" else 0):
            key = wide[f"key{layer}"]
            _, updated, _ = reference.edge_attention(
                rows(wide[f"query{layer}"]), key, key, edge, neighbors, rows(wide[f"gate{layer}"]),
                wide[f"edge_scale{layer}"], problem.scale,
            )  # fmt: skip
            assert updated is not None, "a gate updates the edges"
            edge = updated
        gate = rows(wide["gate"]) if "gate" in wide else None
        found = reference.edge_attention(
            rows(wide["query"]), wide["key"], wide["value"], edge, neighbors, gate, wide.get("edge_scale"),
            problem.scale,
        )  # fmt: skip
        outputs = [output for output in found if output is not None]
    sent = upstream(tensors)
    if not backward:
        return Oracle(receivers, sent, outputs, {}, {})
    if receivers is not None:
        sent = [torch.zeros_like(x).index_copy_(2, receivers, rows(x)) for x in sent]
    wanted = [wide[name] for name in leaves]
    gradients = torch.autograd.grad(outputs, wanted, [rows(x).double() for x in sent])
    by_name = dict(zip(leaves, gradients, strict=True))
    # edge_scale's gradient adds up those of all gates, times the gates.
    sums = {}
    for name in leaves:
        if name.startswith("edge_scale"):
            its_gate = name.replace("edge_scale", "gate")
            sums[name] = float(torch.linalg.vector_norm(wide[its_gate].detach() * by_name[its_gate]))
    return Oracle(receivers, sent, [x.detach() for x in outputs], by_name, sums)
