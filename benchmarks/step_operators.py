"""linear_cross_entropy, dropout_add_layer_norm and varlen_attention, both ways, against plain and compiled PyTorch.

    python -m benchmarks.step_operators [--device cpu|cuda] [--compiled] [--out FILE.json]

Rivals do the same work: ``F.cross_entropy`` of ``F.linear`` on whole logits; ``F.dropout``, the sum and
``F.layer_norm``; ``F.scaled_dot_product_attention`` between making padded texts of rows and rows of those.
``--compiled`` adds them through ``torch.compile``. A call is timed only after its loss, sum and gradients were those
of the rival (dropout off: masks are drawn differently). Times are medians of interleaved measurements; memory is what a
call allocates at most, beyond its inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.command_line import parser_of
from ecore_kernels import (
    Sequences,
    available_backends,
    dropout_add_layer_norm,
    linear_cross_entropy,
    varlen_attention,
)
from ecore_kernels.backends import BACKENDS

WORDS, VOCABULARY, WIDTH = (352, 1408), 23_714, 300
"""Words of a batch of 16 responses and of 64; the paper's vocabulary and width."""
ROWS = (800, 6400)
TEXT, HEADS, HEAD = 22, 2, 20
"""Words of a response on average, and the heads of the released model's attention."""
SMOOTHING, DROPOUT = 0.1, 0.2
TOLERANCE = 1e-4

Function = Callable[..., tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        inputs: its leaves, all asking for gradients.
        ours: the operator on a backend; with ``exact`` without what rivals draw differently.
        plain: the rival, likewise.
        outputs: number of the first outputs that gradients come in for.
    """

    operator: str
    rows: int
    inputs: list[Tensor]
    ours: Callable[[str, bool], Function]
    plain: Callable[[bool], Function]
    outputs: int


def loss_case(words: int, device: str) -> Case:
    """A batch's vocabulary loss."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((words, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    scales = (1.0, WIDTH**-0.5, 0.0)
    inputs = [
        (scale * torch.randn(shape, generator=generator)).to(device).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    target = torch.randint(1, VOCABULARY, (words,), generator=generator).to(device)

    def ours(backend: str, exact: bool) -> Function:
        def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return linear_cross_entropy(
                hidden, weight, bias, target, label_smoothing=SMOOTHING, backend=backend
            )

        return run

    def plain(exact: bool) -> Function:
        return lambda *x: (F.cross_entropy(F.linear(*x), target, label_smoothing=SMOOTHING),)

    return Case("linear_cross_entropy", words, inputs, ours, plain, 1)


def norm_case(rows: int, device: str) -> Case:
    """The end of a layer: rows of words."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, WIDTH), (rows, WIDTH), (WIDTH,), (WIDTH,))
    inputs = [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]

    def ours(backend: str, exact: bool) -> Function:
        p = 0.0 if exact else DROPOUT

        def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return dropout_add_layer_norm(x, residual, weight, bias, p, backend=backend)

        return run

    def plain(exact: bool) -> Function:
        p = 0.0 if exact else DROPOUT

        def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            total = residual + F.dropout(x, p)
            return F.layer_norm(total, (WIDTH,), weight, bias), total

        return run

    return Case("dropout_add_layer_norm", rows, inputs, ours, plain, 2)


def attention_case(words: int, device: str) -> Case:
    """Causal attention of responses to themselves; the longest is about twice as long as the average."""
    generator = torch.Generator().manual_seed(0)
    texts = max(1, words // TEXT)
    share = torch.rand(texts, generator=generator)
    lengths = (words * share / share.sum()).long()
    lengths[0] += words - lengths.sum()
    sequences = Sequences.from_lengths(lengths.to(device))
    rows = torch.randn(words, 3, HEADS, HEAD, generator=generator).to(device).requires_grad_()
    columns = torch.arange(sequences.longest, device=device)
    there = columns < sequences.lengths[:, None]  # [texts, longest]
    places = there.flatten().nonzero()[:, 0]  # of the rows, among the padded texts'

    def ours(backend: str, exact: bool) -> Function:
        return lambda rows: (varlen_attention(rows, None, None, sequences, causal=True, backend=backend),)

    def attend(rows: Tensor) -> tuple[Tensor]:
        padded = rows.new_zeros(there.numel(), *rows.shape[1:]).index_copy(0, places, rows)
        query, key, value = padded.unflatten(0, there.shape).permute(
            2, 0, 3, 1, 4
        )  # [texts, heads, longest, d]
        # Padding is behind the words, which do not hear it.
        heard = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return (heard.transpose(1, 2).flatten(0, 1).index_select(0, places),)

    return Case("varlen_attention", words, [rows], ours, lambda exact: attend, 1)


def step(case: Case, function: Function) -> Callable[[int], Sequence[Tensor]]:
    """Forward and backward, whose upstream gradients are ones."""

    def run(_: int) -> Sequence[Tensor]:
        outputs = function(*case.inputs)[: case.outputs]
        return torch.autograd.grad(outputs, case.inputs, [torch.ones_like(y) for y in outputs])

    return run


def check(case: Case, backend: str) -> None:
    """A timing counts only for a right answer."""
    ours, plain = case.ours(backend, True), case.plain(True)
    values = zip(ours(*case.inputs)[: case.outputs], plain(*case.inputs), strict=True)
    gradients = zip(step(case, ours)(0), step(case, plain)(0), strict=True)
    for found, wanted in (*values, *gradients):
        if not (found - wanted).norm() <= TOLERANCE * wanted.norm() + 1e-6 * wanted.numel() ** 0.5:
            raise SystemExit(f"{case.operator} of {case.rows} rows on {backend} differs from PyTorch's")


def run(device: str, compiled: bool, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One result a case, each as soon as it is there; ``left_out`` gets why a candidate is missing."""
    backends = [name for name in available_backends() if (name == "triton") == (device == "cuda")]
    cases = [
        *((loss_case, size) for size in WORDS),
        *((norm_case, size) for size in ROWS),
        *((attention_case, size) for size in WORDS),
    ]
    for make, size in cases:
        case = make(size, device)
        if not any(case.operator in BACKENDS[name].refusals for name in backends):
            continue  # varlen_attention has no kernel for GPUs
        calls = {"PyTorch": step(case, case.plain(False))}
        if compiled:
            rival = torch.compile(case.plain(False), fullgraph=True, dynamic=False)
            try:
                step(case, rival)(0)
            except Exception as error:  # no compiler, or what it cannot do
                left_out[f"torch.compile, {case.operator}"] = f"{type(error).__name__}: {error}".splitlines()[
                    0
                ]
            else:
                calls["torch.compile"] = step(case, rival)
        for backend in backends:
            check(case, backend)
            calls[backend] = step(case, case.ours(backend, False))
        timings = harness.interleaved(calls, device=device)
        memory = {name: harness.peak_memory(call, device) for name, call in calls.items()}
        result = {
            "operator": case.operator,
            "rows": size,
            "device": device,
            "timings": timings,
            "memory": memory,
        }
        if device == "cuda":
            result["replayed"] = harness.replays(calls, left_out)
        yield result


def report(results: Sequence[dict[str, Any]]) -> str:
    """A table, a line for each candidate."""
    rows = []
    for result in results:
        timings = harness.best_timings(result)
        plain = timings["PyTorch"].median
        for name, timing in timings.items():
            spread = f"({harness.duration(timing.p20)} – {harness.duration(timing.p80)})"
            rows.append(
                [
                    result["operator"],
                    f"{result['rows']:,}",
                    name,
                    f"{harness.duration(timing.median)} {spread}",
                    f"{plain / timing.median:.2f}",
                    harness.memory(result["memory"][name]),
                ]
            )
    header = ["operator", "rows", "candidate", "median (p20 – p80)", "times as fast as PyTorch", "memory"]
    return harness.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("benchmarks.step_operators", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compiled", action="store_true", help="also time torch.compile of the rivals")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "step_operators: there is no CUDA device\n")
    harness.keep_freed_memory()
    left_out: dict[str, str] = {}
    rows = run(arguments.device, arguments.compiled, left_out)
    results = harness.collect("step_operators", rows, arguments.out)
    print(report(results))
    harness.fail_for(left_out)


if __name__ == "__main__":
    main()
