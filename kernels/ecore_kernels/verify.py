"""Prove an installation: every operator on every backend that runs here, against float64.

``python -m ecore_kernels.verify`` draws random inputs, runs each operator forward and backward on each backend, and
compares outputs and gradients with the paper's layer-by-layer recurrence in float64. An error is allowed to be twice
that of the same recurrence, as anybody would write it in PyTorch, in the type and precision of the call, plus
rounding; NaN never passes. Each call runs twice and must give the same bits. The exit code is 0 if all is right and 1
if anything is wrong. A backend that refuses a call is listed with its reason.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from ecore_kernels import backends, info, problems, reference, triton_kernels
from ecore_kernels.operators.history import EdgeUpdate
from ecore_kernels.operators.otsu import OtsuSplit, otsu
from ecore_kernels.problems import Problem

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
# What is allowed beyond twice the plain operator's error, relative to the Frobenius norm of a tensor; a tenfold of it,
# relative to the largest element, for the worst: where a softmax saturates, single elements are far off in float32.
ROUNDING = {"float64": 2e-13, "ieee": 1e-5, "tf32": 1e-3, "bfloat16": 2**-8}
OTSU_ROWS, OTSU_COLUMNS = 256, (7, 32)
OTSU_TYPES = {"ieee": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

WORKERS = 8  # that compile at a time; each holds a CUDA context
WORKER_BYTES = 3 * 2**30


class DeviceLostError(RuntimeError):
    """After an error nothing runs on the GPU any more in this process."""


@dataclasses.dataclass
class Row:
    """Result of one call on one backend.

    Attributes:
        verdict: "right", "wrong", "failed" (an exception) or "refused".
        error, allowed, tensor: of the tensor that is nearest to what it is allowed or furthest beyond; relative to the
            size of that tensor. None where nothing was compared, ``error`` too where something is not finite.
        same_bits: whether a second run gave the same.
        reason: why the verdict is not "right".
    """

    operator: str
    variant: str
    depth: int
    backend: str
    masks: str
    precision: str
    nodes: int
    verdict: str = "failed"
    error: float | None = None
    allowed: float | None = None
    tensor: str = ""
    same_bits: bool | None = None
    seconds: float = 0.0
    reason: str = ""

    COLUMNS: ClassVar[str] = (
        f"{'operator':24} {'layers':>6} {'N':>4} {'words':5} {'precision':9} {'backend':9} "
        f"{'error':>8} {'allowed':>8} {'bits':5} {'s':>5}  verdict, worst tensor"
    )

    def __str__(self) -> str:
        name = f"{self.operator} {self.variant}".strip()
        error, allowed = (f"{x:8.1e}" if x is not None else f"{'':8}" for x in (self.error, self.allowed))
        bits = {True: "same", False: "DIFFER", None: ""}[self.same_bits]
        verdict = self.verdict if self.verdict in ("right", "refused") else self.verdict.upper()
        detail = self.reason or self.tensor
        return (
            f"{name:24} {self.depth:6} {self.nodes:4} {self.masks:5} {self.precision:9} {self.backend:9} "
            f"{error} {allowed} {bits:5} {self.seconds:5.2f}  {verdict}: {detail}"
        ).rstrip(": ")


# The recurrence


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
    """The outputs of a call, layer by layer as the paper writes them (Eqs. 4 to 8), all of it in type ``kind``."""
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


# The judgement


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
    """Frobenius norm and largest element; NaN where something is not finite."""
    if not bool(tensor.isfinite().all()):
        return math.nan, math.nan
    return float(torch.linalg.vector_norm(tensor)), float(tensor.abs().max())


class Expected:
    """The right answer to a problem, and how far off an answer may be.

    A tensor is judged by the Frobenius norm of its error and by its largest element. The gradient of an edge scale w is
    one number, a sum over gates g of which little may be left, and the plain operator's error of it is a matter of
    luck: it is held to w dw = sum(g dg), the gradients dg being the answer's own, which are judged themselves.
    """

    def __init__(self, problem: Problem, tensors: dict[str, Tensor]) -> None:
        wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        self.exact = answer(problem, wide, lambda given: recurrence(problem, given, torch.float64))
        plain = answer(problem, tensors, lambda given: recurrence(problem, given, problem.dtype))
        self.sizes = {name: _sizes(x) for name, x in self.exact.items()}
        rounding = ROUNDING[problem.precision]
        self.allowed = {}
        for name, x in self.exact.items():
            (error, worst), (size, largest) = _sizes(plain[name].double() - x), self.sizes[name]
            self.allowed[name] = 2 * error + rounding * size, 2 * worst + 10 * rounding * largest
        # By the gradient of an edge scale: the gradient of its gates, and gates over the scale.
        self._sums: dict[str, tuple[str, Tensor]] = {}
        for scale in (name for name in problem.leaves if name.startswith("edge_scale")):
            gate = scale.replace("edge_scale", "gate")
            share = wide[gate] / wide[scale]  # [B, K, N]
            size = _sizes(share * self.exact[f"gradient of {gate}"])[0]  # of the terms
            name = f"gradient of {scale}"
            self._sums[name] = f"gradient of {gate}", share
            self.sizes[name], self.allowed[name] = (size, size), (rounding * size, rounding * size)

    def judge(self, row: Row, found: dict[str, Tensor]) -> None:
        """Enter the worst tensor of an answer into the row, and whether it is right."""
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


# The checks


class OperatorCheck:
    """One call of an operator, to be made on every backend."""

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
        """Enter into the row how far off an answer is."""
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
        values[0] = 0.25  # and here nothing stands out
        return values.to(self.device, OTSU_TYPES[self.precision])

    def refusals(self, backend: str) -> list[str]:
        """Return the reasons why a backend cannot run the call."""
        return backends.BACKENDS[backend].why_not("otsu", self.values)

    def run(self, backend: str) -> dict[str, Tensor]:
        """The split by name."""
        return otsu(self.values, self.most, backend=backend)._asdict()

    def judge(self, row: Row, found: dict[str, Tensor]) -> None:
        """Enter into the row what share of the results differs."""
        exact = dict(
            zip(OtsuSplit._fields, reference.otsu(self.values.double().cpu(), self.most), strict=True)
        )
        row.verdict, row.error, row.allowed = "right", 0.0, 0.0
        for name, right in exact.items():
            share = float((found[name].cpu().to(right.dtype) != right).double().mean())
            if share > row.error:
                row.verdict, row.error, row.tensor = "wrong", share, name
                row.reason = f"{name}: {share:.1%} differ from the exact split"


Check = OperatorCheck | OtsuCheck


def checks(device: str) -> list[Check]:
    """Everything that is checked on a device."""
    sizes = INTERPRETED_SIZES if device == "cpu" and triton_kernels.INTERPRETED else SIZES[device]
    others = {name: value for name, value in sizes.items() if name != "nodes"}
    found: list[Check] = [
        OtsuCheck(columns, precision, most, device)
        for precision, columns, most in itertools.product(OTSU_TYPES, OTSU_COLUMNS, (5, None))
    ]
    every = itertools.product(PRECISIONS[device], CALLS, sizes["nodes"], problems.MASKS)
    for precision, (operator, variant, depth), size, masks in every:
        problem = Problem(
            operator, size, depth=depth, masks=masks, precision=precision, variant=variant, **others
        )
        found.append(OperatorCheck(problem, device))
    return found


def make_row(check: Check, backend: str) -> Row:
    """Run a check on a backend, twice.

    Raises:
        DeviceLostError: after the row's exception nothing runs on the GPU any more; the row is in ``args[1]``.
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
        if not row.same_bits and row.verdict == "right":
            row.verdict, row.reason = "wrong", "a second run gives other bits"
    except Exception as error:  # whatever a backend raises, the other rows go on
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
        except Exception:  # torch says it in several types
            return True
    return False


# Compiling in parallel


def compile_for(calls: Sequence[Problem], device: str) -> None:
    """Run calls on the Triton backend, in a process of its own: what it compiles stays in Triton's cache on disk."""
    for problem in calls:
        problems.set_precision(problem.precision)
        OperatorCheck(problem, device).run("triton")


class Compilers:
    """Processes that compile the Triton kernels of later checks, for one process would take minutes.

    They only fill a cache: whatever becomes of them, the checks run.
    """

    def __init__(self, every: Sequence[Check], device: str) -> None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // WORKER_BYTES
        workers = min(WORKERS, len(os.sched_getaffinity(0)), free)
        self._pool = None
        self._jobs: dict[Problem, concurrent.futures.Future[None]] = {}
        if device != "cuda" or workers < 2 or triton_kernels.unavailable_reason():
            return
        groups: dict[Problem, list[Problem]] = {}
        for check in every:
            if isinstance(check, OperatorCheck):
                # Masks are no matter to the compiler; sizes may be, by what divides the strides.
                alike = dataclasses.replace(check.problem, nodes=0, masks="all")
                groups.setdefault(alike, []).append(check.problem)
        self._pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        for calls in groups.values():
            first = [problem for problem in calls if problem.masks == "all"]
            job = self._pool.submit(compile_for, first, device)
            self._jobs |= dict.fromkeys(calls, job)

    def wait_for(self, check: Check) -> None:
        """Return once the kernels of a check are compiled, or cannot be."""
        if isinstance(check, OperatorCheck) and check.problem in self._jobs:
            concurrent.futures.wait([self._jobs[check.problem]])

    def close(self) -> None:
        """Stop what has not begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


# The command


def run(
    device: str,
    each: Callable[[Row], None] = print,
) -> list[Row]:
    """Check every operator on every backend.

    Args:
        device: "cpu" or "cuda".
        each: called with every row at once. Refusals of one operator for the same reason are one row.

    Returns:
        The rows.

    Raises:
        DeviceLostError: the GPU is lost; ``each`` has all rows up to there.
    """
    before = torch.get_float32_matmul_precision()
    every = checks(device)
    compilers, rows, refusals = Compilers(every, device), [], set()
    try:
        while every:
            check = every.pop(0)  # its tensors are not kept
            for backend in backends.BACKENDS:
                if backend == "triton":
                    compilers.wait_for(check)
                try:
                    row = make_row(check, backend)
                except DeviceLostError as error:
                    each(error.args[1])
                    raise
                refusal = (row.operator, backend, row.reason)
                if row.verdict == "refused" and refusal in refusals:
                    continue
                refusals.add(refusal)
                rows.append(row)
                each(row)
    finally:
        compilers.close()
        torch.set_float32_matmul_precision(before)
    return rows


def write(path: Path, record: dict[str, Any]) -> None:
    """Write what is known so far; at no time is the file half written."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def summary(rows: Sequence[Row], seconds: float) -> str:
    """The rows that are not right, and a line that counts all."""
    bad = [row for row in rows if row.verdict in ("wrong", "failed")]
    counts = [
        (word, sum(row.verdict == word for row in rows)) for word in ("right", "wrong", "failed", "refused")
    ]
    names = ", ".join(dict.fromkeys(row.backend for row in rows if row.verdict != "refused"))
    last = f"{', '.join(f'{count} {word}' for word, count in counts)} in {seconds:.0f} s; backends that ran: {names}"
    return "\n".join([*(["", "Not right:"] if bad else []), *map(str, bad), "", last])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if anything is wrong, 2 for what cannot be asked."""
    parser = argparse.ArgumentParser(
        prog="python -m ecore_kernels.verify",
        description="Check every operator on every backend that runs here, forward and backward, against float64. "
        "Exit code: 0 if all is right, 1 if anything is wrong, 2 for wrong arguments.",
    )
    parser.add_argument(
        "--device", choices=tuple(PRECISIONS), help="where to run (default: cuda where there is a GPU)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there as JSON, as they come")
    arguments = parser.parse_args(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def refuse(why: str) -> None:
        parser.exit(2, f"verify: {why}\n")

    if device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch sees no CUDA device here; python -m ecore_kernels.info says more")
    rows: list[Row] = []
    installation = info.report()

    def keep(finished: bool) -> None:
        if arguments.out is not None:
            entries = [dataclasses.asdict(row) for row in rows]
            record = {"device": device, "installation": installation.splitlines()}
            write(arguments.out, {**record, "finished": finished, "rows": entries})

    try:
        keep(finished=False)
    except OSError as error:
        refuse(f"--out: {error.filename}: {error.strerror}")
    print(f"{installation}\n\n{Row.COLUMNS}", flush=True)
    began = time.perf_counter()

    def each(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)
        keep(finished=False)

    try:
        run(device, each=each)
    except DeviceLostError as error:
        print(summary(rows, time.perf_counter() - began))
        print(f"verify: stopped, for nothing runs on the GPU after this: {error.args[0]}", flush=True)
        return 1
    print(summary(rows, time.perf_counter() - began))
    keep(finished=True)
    return int(any(row.verdict in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
