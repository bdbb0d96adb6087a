"""Random calls of every operator on every backend, outputs and gradients, judged against float64.

A case is drawn from its seed and number alone: sizes, types, strides, masks, broadcasts, layers of history, the inputs
that want gradients, numbers of threads. On a CPU the cases take turns on the instruction sets that it has
(ECORE_KERNELS_SIMD names one). Each run is repeated, natively with another number of threads, and must give the same
bits. A case that goes wrong prints a line to run it again. Exit code: 0 if all is right, 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import table
from ecore_kernels import native
from ecore_kernels.backends import BACKENDS
from tests.fuzz.cases import OPERATORS, operator_of

ROOT = Path(__file__).parents[2]
SECONDS_A_CASE = 300  # then it hangs


class Worker:
    """A process that runs cases on one instruction set, started again behind a case that kills it."""

    def __init__(self, seed: int, backends: Sequence[str], simd: str) -> None:
        self.seed, self.backends, self.simd = seed, backends, simd
        self._process: subprocess.Popen[str] | None = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "ECORE_KERNELS_SIMD": self.simd}
            if not torch.cuda.is_available():
                environment["TRITON_INTERPRET"] = "1"
            command = [sys.executable, "-m", "tests.fuzz.worker", str(self.seed), *self.backends]
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        return self._process

    def verdicts(self, index: int) -> dict[str, str]:
        """The verdict on a case by backend, up to the one that kills the process."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died between two cases
            process.stdin.write(f"{index}\n")
            process.stdin.flush()
        alarm = threading.Timer(SECONDS_A_CASE, process.kill)
        alarm.start()
        found = {}
        for backend in self.backends:
            line = process.stdout.readline()
            if not line:
                found[backend] = f"the process ended with exit code {process.wait()}"
                self._process = None
                break
            found[backend] = line.strip()
        alarm.cancel()
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()


def backends_here() -> list[str]:
    """The backends that run at full speed on this machine."""
    fast = {"reference": True, "native": native.available(), "triton": torch.cuda.is_available()}
    return [name for name, runs in fast.items() if runs]


def instruction_sets() -> list[str]:
    """The instruction sets that native kernels can be run on, the widest last; only the named one if one is."""
    if not native.available() or os.environ.get("ECORE_KERNELS_SIMD"):
        return [os.environ.get("ECORE_KERNELS_SIMD", "")]
    return native.simd()[1]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, help="how many (default 2000; no limit with --minutes)")
    parser.add_argument("--minutes", type=float, help="start no case after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, metavar="NUMBER", help="this one alone")
    parser.add_argument("--operator", choices=OPERATORS, nargs="+", default=OPERATORS)
    parser.add_argument(
        "--backend", choices=tuple(BACKENDS), nargs="+", default=backends_here(),
        help="default: those that are fast here; triton without a GPU is interpreted, slowly, and small cases alone",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if "native" in arguments.backend and not native.available():
        parser.exit(2, f"fuzz: --backend native: {native.unavailable_reason()}\n")
    if "triton" in arguments.backend and importlib.util.find_spec("triton") is None:
        parser.exit(2, "fuzz: --backend triton: Triton is not installed\n")
    cases = arguments.cases
    if cases is None:
        cases = 2000 if arguments.minutes is None else sys.maxsize
    deadline = time.monotonic() + 60 * (arguments.minutes or 1e6)

    sets = instruction_sets() if "native" in arguments.backend else [""]
    workers = {simd: Worker(arguments.seed, arguments.backend, simd) for simd in sets}
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    numbers = itertools.count() if arguments.case is None else [arguments.case]
    wanted = (number for number in numbers if operator_of(arguments.seed, number) in arguments.operator)
    try:
        for number in itertools.islice(wanted, cases):
            if time.monotonic() > deadline:
                break
            operator = operator_of(arguments.seed, number)
            # Every other case on the widest, the others in turn.
            simd = sets[-1] if number % 2 == 0 else sets[number // 2 % len(sets)]
            for backend, verdict in workers[simd].verdicts(number).items():
                word = verdict if verdict in ("right", "refused") else "WRONG"
                counts[operator, f"native {simd}" if backend == "native" else backend, word] += 1
                if word == "WRONG":
                    setting = f"ECORE_KERNELS_SIMD={simd} " if backend == "native" else ""
                    again = f"--seed {arguments.seed} --case {number} --backend {backend}"
                    print(f"{setting}python -m tests.fuzz {again}  # {verdict}", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    print(report(counts))
    return int(any(word == "WRONG" for _, _, word in counts))


def report(counts: collections.Counter[tuple[str, str, str]]) -> str:
    """A row an operator, a column a backend: how many cases were right, wrong or refused."""
    columns = list(dict.fromkeys(backend for _, backend, _ in sorted(counts)))
    rows = []
    for operator in dict.fromkeys(operator for operator, _, _ in sorted(counts)):
        cells = []
        for backend in columns:
            of = {word: counts[operator, backend, word] for word in ("right", "WRONG", "refused")}
            cells.append(", ".join(f"{count} {word}" for word, count in of.items() if count) or "none")
        rows.append([operator, *cells])
    return table(["operator", *columns], rows)


if __name__ == "__main__":
    raise SystemExit(main())
