"""Report on an installation, its backends and what is missing: ``python -m ecore_kernels.info``.

With ``--compile sm_86`` it compiles every kernel of the Triton backend for that architecture, no GPU needed, and prints
the compiler's figures: registers, shared memory, spills, and how much of an SM they fill.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ecore_kernels import backends, native, triton_kernels

ARCHITECTURES = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none visible" if torch.version.cuda else "none: this torch is a CPU build"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} (sm_{properties.major}{properties.minor})")
    return f"{', '.join(names)}, driver {_driver()}"


def _driver() -> str:
    """The version of NVIDIA's kernel module."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return "unknown"
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 ..."
    return next((word for word in words if re.fullmatch(r"\d+(\.\d+)+", word)), "unknown")


def report() -> str:
    """The whole installation in a few lines, for reading and for bug reports."""
    lines = [
        f"ecore {_version('ecore')}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), triton {_version('triton')}, "
        f"{torch.get_num_threads()} threads",
        f"GPUs: {_devices()}",
        f"backends here: {', '.join(backends.available_backends())}",
    ]
    if native.available():
        lines.append("native extension:")
        lines += [f"  {name}: {value}" for name, value in native.build_record().items()]
        used, possible = native.simd()
        lines.append(f"  simd: {used} (this machine can run {', '.join(possible)})")
    else:
        lines.append(f"native extension: missing: {native.unavailable_reason()}")
    lines.append(f"triton kernels: {_triton()}")
    lines += [backends.explain(operator) for operator in backends.OPERATORS]
    lines.append("python -m ecore_kernels.verify checks all of them here against float64")
    return "\n".join(lines)


def _triton() -> str:
    """The state of the Triton backend."""
    reason = triton_kernels.unavailable_reason()
    if not reason:
        where = "under its interpreter, on CPU" if triton_kernels.INTERPRETED else "compiled on first use"
        return f"run here, {where}"
    if importlib.util.find_spec("triton") is None:
        return f"missing: {reason}"
    return f"do not run here: {reason}; --compile {next(iter(ARCHITECTURES))} compiles them without a GPU"


def compile_report(architectures: Sequence[int], to: Path | None = None) -> tuple[str, bool]:
    """Compile all kernels of the launch table for these architectures, on all processors; progress goes to stderr.

    Args:
        architectures: compute capabilities times ten.
        to: a file for the results as JSON.

    Returns:
        A line per kernel as text, and whether all of them compile and fit.
    """
    from ecore_kernels import ahead_of_time

    began, done = time.monotonic(), 0
    wanted = [entry for architecture in architectures for entry in ahead_of_time.entries(architecture)]

    def progress(_: ahead_of_time.Compiled) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done} of {len(wanted)} kernels compiled", end="", file=sys.stderr, flush=True)

    results = ahead_of_time.compile_all(wanted, progress=progress)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if to is not None:
        rows = [ahead_of_time.record(result) for result in results]
        to.write_text(json.dumps({"triton": _version("triton"), "kernels": rows}, indent=1) + "\n")
    lines = []
    for architecture in architectures:
        of_it = [result for result in results if result.entry.architecture == architecture]
        largest = ahead_of_time.ARCHITECTURES[architecture].shared_per_block
        title = f"sm_{architecture}, Triton {_version('triton')}: at most {largest:,} bytes of shared memory a block"
        lines += [title, ahead_of_time.table(of_it), ""]
    failing = sum(bool(result.problem) for result in results)
    outcome = f"{failing} cannot run" if failing else "all compile and fit"
    lines.append(f"{len(results)} kernels in {time.monotonic() - began:.0f} s: {outcome}")
    return "\n".join(lines), not failing


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if a kernel does not compile or fit, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m ecore_kernels.info",
        description="What is installed and compiled, what runs and why something is missing.",
    )
    parser.add_argument(
        "--compile", nargs="+", metavar="ARCH", default=[],
        help="compile all Triton kernels for these architectures and print registers, shared memory, spills and "
        f"occupancy ({', '.join(ARCHITECTURES)}); needs no GPU, takes minutes",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="with --compile: write the results there, too"
    )
    arguments = parser.parse_args(argv)

    def refuse(why: str) -> None:
        parser.exit(2, f"info: {why}\n")

    if not arguments.compile:
        if arguments.json is not None:
            refuse("--json goes with --compile")
        print(report())
        return 0
    for name in arguments.compile:
        if name not in ARCHITECTURES:
            refuse(f"--compile: expected {', '.join(ARCHITECTURES)}, got {name!r}")
    if importlib.util.find_spec("triton") is None:
        refuse("--compile needs Triton: pip install triton")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        refuse(f"--json: {arguments.json.parent}: no such folder")
    text, fine = compile_report(
        [ARCHITECTURES[name] for name in dict.fromkeys(arguments.compile)], arguments.json
    )
    print(text)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
