"""OTSU's split of rows of 32: the compiled operator, the vectorised PyTorch one and scikit-image's, looped.

    python -m benchmarks.otsu [--device cpu|cuda] [--out FILE.json]

scikit-image's ``threshold_otsu`` answers a neighbouring question: it splits a histogram of 256 bins (ours:
exactly, between the values themselves) and knows no limit to how many values are relevant. It stands here
because it is what one would otherwise call; it is timed on at most 64 rows and scaled up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import ecore_kernels
from benchmarks import harness
from benchmarks.command_line import parser_of
from ecore_kernels.native_kernels import otsu as native_otsu

ROWS = (16, 64, 256, 1024, 4096, 16384, 65536)
COLUMNS = 32
MAX_RELEVANT = 5
SKIMAGE_ROWS = 64
# Inputs to rotate among: more than the second-level cache holds, where that does not take too many.
INPUT_ELEMENTS = 2**22


def candidates(inputs: list[torch.Tensor], left_out: dict[str, str]) -> dict[str, Any]:
    """The calls to time on these inputs [B, 32]; ``left_out`` gets why some are missing."""

    def operator(backend: str) -> Any:
        return lambda number: ecore_kernels.otsu(inputs[number % len(inputs)], MAX_RELEVANT, backend=backend)

    calls = {backend: operator(backend) for backend in ("native", "reference")}
    if inputs[0].is_cpu:
        try:
            from skimage.filters import threshold_otsu
        except ImportError as error:
            left_out["scikit-image"] = f"{error}; pip install scikit-image"
        else:
            arrays = [values[:SKIMAGE_ROWS].numpy() for values in inputs]
            calls["skimage"] = lambda number: [threshold_otsu(row) for row in arrays[number % len(arrays)]]
    return calls


def check(values: torch.Tensor) -> None:
    """A timing counts only for a right answer: the backends have to agree on these values, bit for bit."""
    ours, expected = (
        ecore_kernels.otsu(values, MAX_RELEVANT, backend=name) for name in ("native", "reference")
    )
    for name, got, want in zip(ours._fields, ours, expected, strict=True):
        if not torch.equal(got, want):
            raise SystemExit(f"{name} of {values.shape[0]} rows differs from the reference")


def run(device: str, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One result a number of rows, each as soon as it is there; ``left_out`` as in :func:`candidates`."""
    generator = torch.Generator().manual_seed(0)
    for rows in ROWS:
        copies = max(2, min(256, INPUT_ELEMENTS // (rows * COLUMNS)))
        inputs = [torch.randn(rows, COLUMNS, generator=generator).to(device) for _ in range(copies)]
        for values in inputs[:4]:
            check(values)
        timings = harness.interleaved(candidates(inputs, left_out), device=device)
        result: dict[str, Any] = {"rows": rows, "columns": COLUMNS, "device": device, "timings": timings}
        result["reference_over_native"] = timings["reference"].median / timings["native"].median
        if "skimage" in timings:
            scale = rows / min(rows, SKIMAGE_ROWS)
            result["skimage_scaled_by"] = scale
            result["skimage_over_native"] = timings["skimage"].median * scale / timings["native"].median
        yield result


def show(result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    cells = [f"{result['rows']:,}"]
    for name in ("native", "reference"):
        timing = result["timings"][name]
        low, high = harness.duration(timing.p20), harness.duration(timing.p80)
        cells.append(f"{harness.duration(timing.median)} ({low} – {high})")
    cells.append(f"{result['reference_over_native']:.1f}")
    if "skimage_over_native" in result:
        scaled = result["timings"]["skimage"].median * result["skimage_scaled_by"]
        cells += [harness.duration(scaled), f"{result['skimage_over_native']:,.0f}"]
    return cells


def report(results: Sequence[dict[str, Any]]) -> str:
    """A table, a line for each number of rows; of results as measured."""
    header = ["rows of 32", "native: median (p20 – p80)", "PyTorch: median (p20 – p80)", "PyTorch / native"]
    if "skimage_over_native" in results[0]:
        header += ["scikit-image, loop, scaled", "scikit-image / native"]
    return harness.table(header, [show(result) for result in results])


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("benchmarks.otsu", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "otsu: there is no CUDA device\n")
    reason = native_otsu.why_not(torch.empty(1, COLUMNS, device=arguments.device))
    if reason:
        parser.exit(2, f"otsu: nothing to compare: native {reason}\n")

    left_out: dict[str, str] = {}
    results = harness.collect("otsu", run(arguments.device, left_out), arguments.out)
    print(report(results))
    harness.fail_for(left_out)


if __name__ == "__main__":
    main()
