"""A whole training step: what it costs, what each improvement is worth, where its time goes, how it grows.

``python -m benchmarks.training [--data PREPARED] [--preset released] [--device cpu] [--out FILE.json]``

Times are of forward, backward and optimiser on batches of 16. "Plain PyTorch" has what PyTorch offers in place of every
improvement; each improvement is added to it alone, then all. Configurations, each in a process of its own, take steps
in turn with plain PyTorch on the same batches. Peak memory is of further processes.

On a GPU (``--device cuda``) they run in turn pass by pass over the batches, which lie there; steps as CUDA graphs
gather theirs. Compilation and recording are before the clock starts and are reported apart. A configuration that fails,
or for which ``--seconds-budget`` leaves no time, is reported as such; results are written after every part. One that
fails is a failure of the whole, by name, when all is written.
``benchmarks.whole_run`` times whole trainings.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from benchmarks.training import breakdown
from benchmarks.training.report import plot, report
from benchmarks.training.runner import (
    NO_TIME,
    InOwnProcess,
    InThisProcess,
    Stepper,
    compare,
    compare_passes,
    serve,
)
from benchmarks.training.steps import WITHOUT, Steps, configurations
from benchmarks.workload import Workload, workload
from ecore.errors import InputError
from ecore.files import read_json

PLAIN = "plain PyTorch"
MEMORY_OF = (PLAIN, "all", "all, bfloat16")
"""The configurations whose peak memory is measured on a CPU."""
NEEDS_COMPILER = "torch.compile"


def parser() -> argparse.ArgumentParser:
    parser = parser_of("benchmarks.training", __doc__)
    parser.add_argument(
        "--data", type=Path, help="a prepared folder (default: made-up batches of the same sizes)"
    )
    parser.add_argument("--preset", choices=("released", "baseline", "paper"), default="released")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--rounds", type=int, help="steps of each configuration (default: 24); passes on a GPU (default: 7)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes of compilation)")
    parser.add_argument(
        "--seconds-budget", type=float, help="on a GPU: spend about so many seconds on the configurations"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--plot", type=Path, help="draw them, as .svg or .png")
    parser.add_argument("--from", dest="kept", type=Path, help="draw kept results instead of measuring")
    parser.add_argument("--compile-only", action="store_true", help="fill torch.compile's cache alone")
    parser.add_argument("--only", nargs="+", metavar="CONFIGURATION", help="measure or compile these alone")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--steps-of", help=argparse.SUPPRESS)
    return parser


def draw_kept(path: Path, image: Path | None) -> None:
    """Draw the results that ``--out`` wrote, beside them where no image is named.

    Raises:
        InputError: the file is missing or holds something else.
    """
    try:
        document = read_json(path)["results"][0]
        rows, preset = document["configurations"], document["preset"]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"--from: {path}: expected results of this benchmark ({error})") from None
    plot(rows, preset, image or path.with_suffix(".svg"), document.get("device", "cpu"))


def chosen(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return the configurations to measure or compile, by name.

    Raises:
        InputError: ``--only`` has a name that is none of them.
    """
    named = configurations(arguments.compile or arguments.compile_only, arguments.device)
    if not arguments.only:
        return named
    unknown = [name for name in arguments.only if name not in named]
    if unknown:
        raise InputError(f"--only: expected some of {'; '.join(named)}, got {unknown[0]!r}")
    return {name: parts for name, parts in named.items() if name in arguments.only}


def fill_compiler_cache(work: Workload, named: dict[str, list[str]], device: str) -> None:
    """Compile these configurations, and print a line for each."""
    for name, parts in named.items():
        if NEEDS_COMPILER in parts and "CUDA graphs" not in parts:  # recording compiles nothing new
            Steps(work, parts, device).warm_up()
            print(f"compiled: {name}", flush=True)


def time_on_gpu(
    work: Workload,
    named: dict[str, list[str]],
    passes: int,
    budget: float | None,
    document: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """Add a row for each configuration to ``document``, and write it: once before anything is compiled.

    Compiling may take longer than there is time.
    """
    torch._dynamo.config.recompile_limit = 64  # all configurations share one code's compilations
    compiled = {name: parts for name, parts in named.items() if NEEDS_COMPILER in parts}
    others = {name: parts for name, parts in named.items() if name not in compiled}
    share = None if budget is None else budget * (0.6 if compiled else 1.0)
    rows = compare_passes(work, others, passes, "cuda", budget=share)
    document["configurations"] = rows
    write()
    if compiled:
        left = None if budget is None or share is None else budget - share
        plain = {PLAIN: others[PLAIN]} if PLAIN in others else {}
        more = compare_passes(work, {**plain, **compiled}, passes, "cuda", budget=left)
        rows += [row for row in more if row["configuration"] in compiled]
        write()


def time_on_cpu(
    starts: Mapping[str, Callable[[], Stepper]],
    rounds: int,
    memory: Callable[[str], float],
    document: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """Add a row for each configuration to ``document``, write it, and add peak memory: ``memory(name)``."""
    rows = compare(starts, rounds)
    document["configurations"] = rows
    write()
    for row in rows:
        if row["configuration"] in MEMORY_OF and "refused" not in row:
            # It may need more than there is.
            with contextlib.suppress(subprocess.CalledProcessError):
                row["peak_memory_mib"] = memory(row["configuration"])


def own_process(arguments: argparse.Namespace, name: str) -> Stepper:
    """Start the process of a configuration."""
    return InOwnProcess(breakdown.command(arguments.preset, arguments.data, "--steps-of", name))


def measure(work: Workload, named: dict[str, list[str]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all results; ``--out`` has them as they come."""
    device, rounds = arguments.device, arguments.rounds
    document: dict[str, Any] = {"preset": arguments.preset, "device": device, "data": work.name}

    def write() -> None:
        if arguments.out:
            harness.write_json(arguments.out, "training", [document])

    def memory(name: str) -> float:
        return breakdown.peak_memory(arguments.preset, arguments.data, name)

    if device == "cuda":
        time_on_gpu(work, named, rounds or 7, arguments.seconds_budget, document, write)
    else:
        starts = {name: partial(own_process, arguments, name) for name in named}
        time_on_cpu(starts, rounds or 24, memory, document, write)
    document["growth"] = breakdown.growth(work, device)
    write()
    profiled: dict[str, list[str]] = {"plain": [], "all": list(WITHOUT)}
    document["parts"] = {
        name: breakdown.where_time_goes(work, parts, device) for name, parts in profiled.items()
    }
    write()
    return document


def main(argv: Sequence[str] | None = None) -> None:
    command_line = parser()
    arguments = command_line.parse_args(argv)
    device = arguments.device
    try:
        if arguments.kept:
            draw_kept(arguments.kept, arguments.plot)
            return
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no CUDA device here")
        work = workload(arguments.data, arguments.preset)
        if arguments.steps_of:
            parts = configurations(True)[arguments.steps_of]
            breakdown.begin_process(parts)
            serve(InThisProcess(work, parts), sys.stdin)
            return
        if arguments.memory_of:
            print(breakdown.peak_memory_here(work, arguments.memory_of))
            return
        named = chosen(arguments)
    except InputError as error:
        command_line.error(str(error))
    if arguments.compile_only:
        fill_compiler_cache(work, named, device)
        return
    document = measure(work, named, arguments)
    print(report(document))
    rows = document["configurations"]
    if arguments.plot:
        plot(rows, arguments.preset, arguments.plot, device)
    harness.fail_for(
        {row["configuration"]: row["refused"] for row in rows if row.get("refused", NO_TIME) != NO_TIME}
    )


if __name__ == "__main__":
    main()
