"""Checks: one call of an operator, or one split, made on every backend."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import backends, problems, reference, triton_kernels
from ecore_kernels.operators.history import EdgeUpdate
from ecore_kernels.operators.otsu import OtsuSplit, otsu
from ecore_kernels.problems import Problem
from ecore_kernels.verify.edge_checks import EDGE_CALLS, EdgeCheck
from ecore_kernels.verify.oracle import Expected, answer
from ecore_kernels.verify.rows import Row
from ecore_kernels.verify.sequence_checks import SEQUENCE_CALLS, SequenceCheck
from ecore_kernels.verify.step_checks import STEP_CALLS, StepCheck

PRECISIONS = {"cuda": ("tf32", "bfloat16", "ieee"), "cpu": ("ieee", "float64", "bfloat16")}
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"nodes": (77, 160), "batch": 4},
    "cpu": {"nodes": (77, 160), "batch": 2},
}
# Triton's interpreter takes seconds where a GPU takes microseconds: some five minutes for these, on one core.
INTERPRETED_SIZES: dict[str, Any] = {"nodes": (40,), "batch": 1, "resolutions": 2, "emotions": 7, "dim": 20}
# Operator, variant, layers of history.
CALLS = (
    ("graph_attention", "", 0),
    ("graph_attention", "", 1),
    ("graph_attention", "", 2),
    ("graph_attention", "words", 1),
    ("graph_attention", "relevant", 1),
    ("edge_readout", "", 0),
    ("edge_readout", "", 1),
    ("edge_readout", "", 2),
    ("edge_readout", "per_word", 2),
    ("edge_readout", "relevant", 1),
    ("edge_attention", "", 0),
    ("edge_attention", "", 1),
    ("edge_attention", "shared", 1),
    ("module", "", 2),
)
OTSU_ROWS, OTSU_COLUMNS = 256, (7, 32)
OTSU_TYPES = {"ieee": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class DeviceLostError(RuntimeError):
    """After an error the GPU runs nothing more in this process."""


class OperatorCheck:
    """One call of an operator, which is made on every backend."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem, self.device = problem, device

    def row(self, backend: str) -> Row:
        """An empty row."""
        of = self.problem
        return Row(of.operator, of.variant, of.depth, backend, of.masks, of.precision, of.nodes)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The inputs and the outputs' gradients."""
        return problems.draw(self.problem, 0, self.device)

    @functools.cached_property
    def _expected(self) -> Expected:
        return Expected(self.problem, self.tensors)

    def refusals(self, backend: str) -> list[str]:
        """Return the reasons why a backend cannot run the call."""
        why_not = backends.BACKENDS[backend].why_not
        asked = problems.asking(self.tensors, self.problem.leaves)
        nodes = [asked.get(name) for name in ("query", "key", "value")]
        if self.problem.operator == "edge_attention":
            return why_not(
                "edge_attention", *nodes, asked["edge"], asked["neighbors"], gate=asked.get("gate")
            )
        graph = problems.graph_of(asked)
        if self.problem.operator == "graph_attention":
            return why_not("graph_attention", *nodes, graph, problems.history_of(self.problem, asked))
        if self.problem.operator == "edge_readout":
            return why_not("edge_readout", graph, problems.history_of(self.problem, asked))
        heads = asked["nodes"].unflatten(-1, (self.problem.resolutions, self.problem.dim)).transpose(1, 2)
        past = [EdgeUpdate(heads, heads)] * self.problem.depth
        reasons = why_not("graph_attention", heads, heads, heads, graph, past[1:])
        return list(dict.fromkeys([*reasons, *why_not("edge_readout", graph, past)]))

    def run(self, backend: str) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        return answer(self.problem, self.tensors, lambda given: problems.call(self.problem, given, backend))

    def judge(self, row: Row, found: dict[str, Tensor]) -> None:
        """Enter the verdict on an answer into the row, and its error."""
        self._expected.judge(row, found)


@dataclasses.dataclass(frozen=True)
class OtsuCheck:
    """Otsu's splits of random rows, which must be those of the reference in float64 on the CPU, exactly."""

    columns: int
    precision: str
    most: int | None
    device: str

    def row(self, backend: str) -> Row:
        """An empty row."""
        variant = "all splits" if self.most is None else ""
        return Row("otsu", variant, 0, backend, "", self.precision, self.columns)

    @functools.cached_property
    def values(self) -> Tensor:
        """[rows, columns]"""
        values = torch.randn(OTSU_ROWS, self.columns, generator=torch.Generator().manual_seed(0))
        values[:, 1] = values[:, 0]  # equal values stay together
        values[0] = 0.25  # no value stands out in this row
        return values.to(self.device, OTSU_TYPES[self.precision])

    def refusals(self, backend: str) -> list[str]:
        """Return the reasons why a backend cannot run the call."""
        return backends.BACKENDS[backend].why_not("otsu", self.values)

    def run(self, backend: str) -> dict[str, Tensor]:
        """The split by name."""
        return otsu(self.values, self.most, backend=backend)._asdict()

    def judge(self, row: Row, found: dict[str, Tensor]) -> None:
        """Enter the share of the results that differ into the row."""
        exact = dict(
            zip(OtsuSplit._fields, reference.otsu(self.values.double().cpu(), self.most), strict=True)
        )
        row.verdict, row.error, row.allowed = "right", 0.0, 0.0
        for name, right in exact.items():
            share = float((found[name].cpu().to(right.dtype) != right).double().mean())
            if share > row.error:
                row.verdict, row.error, row.tensor = "wrong", share, name
                row.reason = f"{name}: {share:.1%} differ from the exact split"


Check = OperatorCheck | OtsuCheck | StepCheck | EdgeCheck | SequenceCheck


def checks(device: str) -> list[Check]:
    """All checks on a device."""
    interpreted = device == "cpu" and triton_kernels.INTERPRETED
    sizes = INTERPRETED_SIZES if interpreted else SIZES[device]
    others = {name: value for name, value in sizes.items() if name != "nodes"}
    found: list[Check] = [
        OtsuCheck(columns, precision, most, device)
        for precision, columns, most in itertools.product(OTSU_TYPES, OTSU_COLUMNS, (5, None))
    ]
    found += [StepCheck(*call, precision, device) for call in STEP_CALLS for precision in PRECISIONS[device]]
    found += [
        SequenceCheck(*call, precision, device) for call in SEQUENCE_CALLS for precision in PRECISIONS[device]
    ]
    every = itertools.product(PRECISIONS[device], CALLS, sizes["nodes"], problems.MASKS)
    for precision, (operator, variant, depth), size, masks in every:
        problem = Problem(
            operator, size, depth=depth, masks=masks, precision=precision, variant=variant, **others
        )
        found.append(OperatorCheck(problem, device))
    for call, precision in itertools.product(EDGE_CALLS, PRECISIONS[device]):
        found.append(EdgeCheck(*call, precision, device, interpreted))
    return found


def make_row(check: Check, backend: str) -> Row:
    """Run a check on a backend, twice.

    Raises:
        DeviceLostError: after the row's exception the GPU runs nothing more; the row is in ``args[1]``.
    """
    row, began = check.row(backend), time.perf_counter()
    try:
        problems.set_precision(row.precision)
        reasons = check.refusals(backend)
        if reasons:
            row.verdict, row.reason = "refused", "; ".join(reasons)
            return row
        first, second = check.run(backend), check.run(backend)
        check.judge(row, first)
        row.same_bits = all(_same_bits(x, second[name]) for name, x in first.items())
        # PyTorch's own sums over a graph's edges come in the order of its threads.
        if not row.same_bits and row.verdict == "right" and backend != "reference":
            row.verdict, row.reason = "wrong", "a second run gives other bits"
    except Exception as error:  # of any type: the other rows go on
        row.verdict = "failed"
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        if _lost(error, check.device):
            raise DeviceLostError(row.reason, row) from error
    finally:
        row.seconds = round(time.perf_counter() - began, 2)
    return row


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _lost(error: Exception, device: str) -> bool:
    if "CUDA error" in str(error):
        return True
    if device == "cuda":
        try:
            torch.ones(1, device=device).add(1).item()
        except Exception:  # torch reports it by several types
            return True
    return False
