"""The graph operators against plain PyTorch, torch.compile, FlexAttention and the physical floor.

    python -m benchmarks.operators [--device cpu|cuda] [--operators graph_attention edge_readout edge_attention]
        [--nodes 160 288 ...] [--depths 1 ...] [--precision tf32 bfloat16 ieee] [--masks all real]
        [--seconds-budget S] [--out FILE.json]

B 16 (1 from N = 2048 on), K 3, P 32, d 100. ``benchmarks/operators/problems.py`` says how inputs are drawn (all words
taking part, and masks as real data has them), ``candidates.py`` what each candidate does and why
that is the same work, ``floors.py`` what the floor counts. graph_attention has one layer of history
unless ``--depths`` says otherwise, edge_readout two; edge_attention is measured with (depth 1) and without (0)
the edges' update.

A candidate is timed only after its outputs, and where they are timed its gradients, passed the float64 oracle
in this very run on the very inputs; otherwise its place says why. Times are medians of interleaved measurements
over rotating sets of inputs, Python and launches included; on CUDA the same calls are replayed from a CUDA
graph too, which leaves those out. Ratios are a rival's time over ours, of medians and of minima: where the
medians' is below 1 we lose, and the row says so. Results are written after every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from benchmarks.operators import problems, report
from benchmarks.operators.plan import plan
from benchmarks.operators.problems import Problem
from benchmarks.operators.runner import LOST_DEVICE, LostDeviceError, Runner, run
from ecore.errors import InputError


def parser() -> argparse.ArgumentParser:
    parser = parser_of("benchmarks.operators", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--operators", nargs="+", choices=problems.OPERATORS, default=list(problems.OPERATORS)
    )
    parser.add_argument("--nodes", nargs="+", type=int, help="N, the most telling first")
    parser.add_argument(
        "--depths", nargs="+", type=int, help="layers of history, where an operator takes any"
    )
    parser.add_argument("--precision", nargs="+", choices=problems.PRECISIONS)
    parser.add_argument("--masks", nargs="+", choices=problems.MASKS, default=list(problems.MASKS))
    parser.add_argument("--seconds-budget", type=float, help="start no new problem after so many seconds")
    parser.add_argument("--compile-only", action="store_true", help="only fill torch.compile's cache on disk")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has already")
    return parser


def refusal(arguments: argparse.Namespace) -> str | None:
    """Return the reason why these arguments cannot be measured here, or None."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if arguments.device == "cpu" and "tf32" in (arguments.precision or ()):
        return "tf32 is a GPU's precision: use ieee or bfloat16 on the CPU"
    smallest = Problem("graph_attention", 0).emotions + 1
    if any(size < smallest for size in arguments.nodes or ()):
        return f"--nodes: at least {smallest}: 32 emotions and one word"
    return None


def fill_compiler_cache(wanted: Sequence[tuple[Problem, str]], device: str) -> None:
    """Compile the rivals, a line for each with its seconds, or why it failed."""
    for problem, direction in wanted:
        for name, seconds in Runner(problem, direction, device, ("compiled", "flex")).compile():
            print(problem.operator, problem.nodes, problem.precision, direction, name, seconds, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    refused = refusal(arguments)
    if refused:
        parser().exit(2, f"operators: {refused}\n")
    device, out = arguments.device, arguments.out
    wanted = plan(device, arguments.operators, arguments.nodes, arguments.precision, arguments.depths)
    if arguments.compile_only:
        fill_compiler_cache(wanted, device)
        return

    def write(results: list[dict[str, Any]]) -> None:
        if out:
            harness.write_json(out, "operators", results)

    try:
        kept = report.load(out) if arguments.resume and out and out.exists() else ()
    except (InputError, AttributeError, KeyError, TypeError) as error:
        parser().exit(2, f"operators: --resume: {out}: expected results of this benchmark ({error})\n")
    budget = arguments.seconds_budget
    try:
        results = run(wanted, device, masks=arguments.masks, budget=budget, done=write, before=kept)
    except LostDeviceError:
        parser().exit(LOST_DEVICE, "operators: an error took the GPU away; --resume goes on behind it\n")
    print(report.report(results))


if __name__ == "__main__":
    main()
