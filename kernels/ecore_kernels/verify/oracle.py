"""The right answer to a call, by the paper's layer-by-layer recurrence in float64, and the error that is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from ecore_kernels import problems
from ecore_kernels.operators.history import EdgeUpdate
from ecore_kernels.problems import Problem
from ecore_kernels.verify.rows import Row

# Error allowed beyond twice the plain operator's, relative to the Frobenius norm of a tensor. The worst element may
# have ten times as much, relative to the largest element: if a softmax saturates, single elements are far off in
# float32.
ROUNDING = {"float64": 2e-13, "ieee": 1e-5, "tf32": 1e-3, "bfloat16": 2**-8}


def _layer(update: EdgeUpdate, edge: Tensor, neighbors: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One layer on the edges before it: its scores (Eq. 7) and the edges after it (Eq. 5), both [B, K, N, N]."""
    weighted = scale * (update.query @ update.key.mT) * edge
    if update.gate is None or update.edge_scale is None:
        return weighted, edge
    new_edge = update.gate[..., None] * update.edge_scale * (edge + weighted)
    return weighted, new_edge.masked_fill(~neighbors, 0.0)


def _attend(weighted: Tensor, neighbors: Tensor, value: Tensor) -> Tensor:
    """[B, K, N, dv]: softmax among neighbours (Eq. 6) times values (Eq. 4)."""
    lowest = torch.finfo(weighted.dtype).min
    return weighted.masked_fill(~neighbors, lowest).softmax(-1).masked_fill(~neighbors, 0.0) @ value


def recurrence(problem: Problem, tensors: Mapping[str, Tensor], kind: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs of a call, layer by layer as in the paper (Eqs. 4 to 8), all in type ``kind``."""
    given = {name: x.to(kind) if x.is_floating_point() else x for name, x in tensors.items()}
    if problem.operator == "edge_attention":
        update = EdgeUpdate(given["query"], given["key"], given.get("gate"), given.get("edge_scale"))
        weighted, new_edge = _layer(update, given["edge"], given["neighbors"], problem.scale)
        output = _attend(weighted, given["neighbors"], given["value"])
        return (output, new_edge) if problem.depth else (output,)
    words = problem.words
    edge, neighbors = problems.graph_of(given).dense()
    if problem.operator == "module":
        output, heads = given["nodes"], (problem.resolutions, problem.dim)
        for m in range(problem.depth):
            weights = problems.layer_weights(given, m)
            query, key, value = (
                linear(output, weights[f"{name}.weight"]).unflatten(-1, heads).transpose(1, 2)
                for name in ("query", "key", "value")
            )  # [B, K, N, d]
            update = EdgeUpdate(query, key, linear(output, weights["gate.weight"]).mT, weights["edge_scale"])
            weighted, edge = _layer(update, edge, neighbors, problem.scale)
            attended = _attend(weighted, neighbors, value)
            output = attended.transpose(1, 2).flatten(2)
    else:
        for update in problems.history_of(problem, given):
            _, edge = _layer(update, edge, neighbors, problem.scale)
        if problem.operator == "graph_attention":
            update = EdgeUpdate(given["query"], given["key"])
            attended = _attend(_layer(update, edge, neighbors, problem.scale)[0], neighbors, given["value"])
            return (attended[:, :, :words] if problem.variant == "words" else attended,)
    received = edge[..., words:].sum(1)  # [B, N, P]
    to_word, to_emotion = received[:, :words], received[:, words:]
    readout = (to_word if problem.variant == "per_word" else to_word.sum(1), to_emotion)
    return (attended, *readout) if problem.operator == "module" else readout


def answer(
    problem: Problem,
    tensors: dict[str, Tensor],
    compute: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
) -> dict[str, Tensor]:
    """Outputs and gradients of a call by name."""
    asked = problems.asking(tensors, problem.leaves)
    outputs = compute(asked)
    sent = [x.to(output.dtype) for output, x in zip(outputs, problems.upstream(tensors), strict=True)]
    leaves = [asked[name] for name in problem.leaves]
    gradients = torch.autograd.grad(outputs, leaves, sent, materialize_grads=True)
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return found | {f"gradient of {n}": g for n, g in zip(problem.leaves, gradients, strict=True)}


def _sizes(tensor: Tensor) -> tuple[float, float]:
    """Frobenius norm and largest element; NaN if an element is not finite."""
    if not bool(tensor.isfinite().all()):
        return math.nan, math.nan
    return float(torch.linalg.vector_norm(tensor)), float(tensor.abs().max())


class Bounds:
    """The right answer to a call, and how far off an answer may be.

    A tensor is judged by the Frobenius norm of its error and by its largest element.

    Args:
        exact: outputs and gradients by name, in float64.
        plain: those of the plain operator, in the type of the call.
        precision: of :data:`ROUNDING`.
    """

    def __init__(self, exact: Mapping[str, Tensor], plain: Mapping[str, Tensor], precision: str) -> None:
        self.exact = exact
        self.sizes = {name: _sizes(x) for name, x in exact.items()}
        rounding = ROUNDING[precision]
        self.allowed = {}
        for name, x in exact.items():
            (error, worst), (size, largest) = _sizes(plain[name].double() - x), self.sizes[name]
            self.allowed[name] = 2 * error + rounding * size, 2 * worst + 10 * rounding * largest
        self._rounding = rounding
        # For the gradient of an edge scale: the gradient of its gates, and the gates divided by the scale.
        self._sums: dict[str, tuple[str, Tensor]] = {}

    def hold_to_gate(self, scale: str, gate: str, tensors: Mapping[str, Tensor]) -> None:
        """Judge the gradient of an edge scale w by those of its gates g, which are checked too.

        It is one number, a sum over gates whose terms may cancel, so the plain operator's error of it is a matter of
        chance. The test is w dw = sum(g dg), with the answer's own gradients dg.

        Args:
            scale, gate: names of the two.
            tensors: the two, in float64.
        """
        share = tensors[gate] / tensors[scale]  # [B, K, N]
        size = _sizes(share * self.exact[f"gradient of {gate}"])[0]  # of the terms
        name, allowed = f"gradient of {scale}", self._rounding * size
        self._sums[name] = f"gradient of {gate}", share
        self.sizes[name], self.allowed[name] = (size, size), (allowed, allowed)

    def judge(self, row: Row, found: dict[str, Tensor]) -> None:
        """Enter the verdict on an answer into the row, and its worst tensor."""
        worst = -1.0
        row.verdict = "right"
        for name, exact in self.exact.items():
            if found[name].shape != exact.shape:
                row.verdict, row.tensor = "wrong", name
                row.reason = f"{name}: expected shape {list(exact.shape)}, got {list(found[name].shape)}"
                return
            if name in self._sums:
                gradient, share = self._sums[name]
                exact = (share * found[gradient].double()).sum()
            errors = _sizes(found[name].double() - exact)
            measures = zip(errors, self.allowed[name], self.sizes[name], ("", ", largest"), strict=True)
            for error, allowed, size, measure in measures:
                if not error <= allowed:
                    row.verdict = "wrong"
                if not math.isfinite(error):
                    row.error, row.allowed, row.tensor = None, None, name
                    row.reason = f"{name}: not finite"
                    return
                ratio = error / allowed if allowed else (math.inf if error else 0.0)
                if ratio > worst:
                    worst, unit = ratio, size or 1.0
                    row.error, row.allowed, row.tensor = error / unit, allowed / unit, name + measure
        if row.verdict == "wrong":
            row.reason = f"{row.tensor}: {worst:.3g} times the error that is allowed"


class Expected(Bounds):
    """The :class:`Bounds` of a problem."""

    def __init__(self, problem: Problem, tensors: dict[str, Tensor]) -> None:
        wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        exact = answer(problem, wide, lambda given: recurrence(problem, given, torch.float64))
        plain = answer(problem, tensors, lambda given: recurrence(problem, given, problem.dtype))
        super().__init__(exact, plain, problem.precision)
        for scale in (name for name in problem.leaves if name.startswith("edge_scale")):
            self.hold_to_gate(scale, scale.replace("edge_scale", "gate"), wide)
