"""Everything that needs a GPU, in one command of nine minutes: tests, compute-sanitizer, benchmarks.

    python -m benchmarks.gpu [--out FOLDER] [--data PREPARED]

With a prepared folder whole training steps are timed on its batches, else on made-up ones, and models trained on it.
Results go to FOLDER; without one, to the folder that $OUT names, else to benchmarks/results/NAME-OF-THE-GPU.
Nothing has to be installed but torch, triton and pytest: the packages are imported from this checkout, and the
compiled extension is built into a temporary folder if it is missing (and done without if that fails). Training
steps are left out where what `ecore` needs besides is missing.

First come the things that need not be alone on the machine, at the same time: the tests marked ``gpu``,
compute-sanitizer's memcheck and racecheck on ``benchmarks.sanitize``, and processes that fill torch.compile's
cache, for compiling takes longer than measuring. Then the benchmarks, one after the other. Every step is a
process of its own with a share of the time; one that fails or hangs is written down, and the next goes on.
summary.json, summary.md and log.txt are written anew after every step, operators.json after every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 540.0
RESERVE_SECONDS = 12.0  # for writing and for processes that take their time to end
BUILD_SECONDS, CHECK_SECONDS, OTSU_SECONDS, TRAINING_SECONDS = 90.0, 200.0, 45.0, 130.0
# Of each whole training; enough to record nearly all shapes and for two validations. The rest is estimated.
RUN_STEPS = 4000
# From a problem's start until its rows are written: what the operators' benchmark may overrun its budget by.
OVERRUN_SECONDS = 45.0
LOG_BYTES = 2**20  # of each step's output
LARGEST_FILE = 15 * 2**20
# Sizes whose compilation is worth a cache: the larger ones need the GPU's memory for themselves.
CACHED_NODES = ("160", "288", "96", "64")


class Step(NamedTuple):
    """One process: what it is called, what it runs, and for how long at most.

    ``required`` is false where ending early is no failure.
    """

    name: str
    command: Sequence[str]
    seconds: float
    required: bool = True


@dataclasses.dataclass
class Report:
    """What has been done so far, and the folder where that is written."""

    folder: Path
    environment: Mapping[str, str]
    machine: Mapping[str, Any]
    total: float = TOTAL_SECONDS
    started: float = dataclasses.field(default_factory=time.monotonic)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    logs: list[str] = dataclasses.field(default_factory=list)

    def left(self) -> float:
        """Seconds until the end, less the reserve."""
        return self.started + self.total - RESERVE_SECONDS - time.monotonic()

    def run(self, *steps: Step) -> None:
        """Run steps at the same time; write down how each ended as soon as it has."""
        with tempfile.TemporaryDirectory() as scratch:
            running: list[tuple[Step, subprocess.Popen[bytes], Path, float]] = []
            try:
                for number, step in enumerate(steps):
                    log = Path(scratch, str(number))
                    try:
                        with log.open("wb") as output:
                            process = subprocess.Popen(
                                step.command,
                                cwd=ROOT,
                                env=dict(self.environment),
                                stdin=subprocess.DEVNULL,
                                stdout=output,
                                stderr=subprocess.STDOUT,
                                start_new_session=True,
                            )
                    except OSError as error:
                        self._record(step, f"did not start: {error}", 0.0, log)
                    else:
                        running.append((step, process, log, time.monotonic()))
                while running:
                    for entry in list(running):
                        step, process, log, began = entry
                        seconds = time.monotonic() - began
                        if process.poll() is not None:
                            outcome = "ok" if process.returncode == 0 else f"exit code {process.returncode}"
                        elif seconds > step.seconds or self.left() < 0:
                            outcome = "stopped: its time was over"
                        else:
                            continue
                        _end(process)
                        running.remove(entry)
                        self._record(step, outcome, seconds, log)
                    time.sleep(0.05)
            finally:
                for _, process, _, _ in running:
                    _end(process)

    def _record(self, step: Step, outcome: str, seconds: float, log: Path) -> None:
        output = log.read_bytes() if log.exists() else b""
        if len(output) > LOG_BYTES:
            half = LOG_BYTES // 2
            output = output[:half] + b"\n[...]\n" + output[-half:]
        text = output.decode(errors="replace")
        self.records.append(
            {
                "step": step.name,
                "outcome": outcome,
                "required": step.required,
                "seconds": round(seconds, 1),
                "end_of_output": text.splitlines()[-12:],
            }
        )
        self.logs.append(
            f"==== {step.name}: {outcome}, {seconds:.1f} s\n$ {' '.join(step.command)}\n{text}\n"
        )
        print(f"{step.name}: {outcome}, {seconds:.1f} s", flush=True)
        self.write()

    def note(self, name: str, why: str) -> None:
        """Write down a step that is left out."""
        self._record(Step(name, (), 0.0, required=False), f"left out: {why}", 0.0, Path(os.devnull))

    def failed(self) -> bool:
        """Whether a step that has to succeed did not."""
        return any(record["required"] and record["outcome"] != "ok" for record in self.records)

    def write(self) -> None:
        """The summary for machines and for people, and all output."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tests = test_results(self.folder / "tests.xml")
        seconds = round(time.monotonic() - self.started, 1)
        summary = {"machine": self.machine, "seconds": seconds, "tests": tests, "steps": self.records}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        (self.folder / "summary.md").write_text(self._markdown(tests, seconds))
        (self.folder / "log.txt").write_text("\n".join(self.logs))
        for file in self.folder.iterdir():
            if file.is_file() and file.stat().st_size > LARGEST_FILE:
                file.write_text(f"left out: {file.stat().st_size} bytes\n")

    def _markdown(self, tests: Mapping[str, Any] | None, seconds: float) -> str:
        lines = [f"# {self.machine.get('gpu', 'GPU')}, {seconds:.0f} s", ""]
        lines += [
            f"- {record['step']}: {record['outcome']}, {record['seconds']} s" for record in self.records
        ]
        if tests:
            lines.append(
                f"\nTests: {tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed"
            )
            lines += [f"- {name}" for name in tests["failed"]]
        for record in self.records:
            if record["required"] and record["outcome"] != "ok":
                lines += [
                    f"\n## {record['step']}: the end of its output\n",
                    "```",
                    *record["end_of_output"],
                    "```",
                ]
        results = self.folder / "training.json"
        if results.exists():
            from benchmarks import training_report

            lines += ["", training_report.report(json.loads(results.read_text())["results"][0])]
        results = self.folder / "operators.json"
        if results.exists():
            from benchmarks import operators

            lines += ["", operators.report(operators.load(results))]
        return "\n".join(lines) + "\n"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started: it leads a process group of its own."""
    for kind, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def test_results(path: Path) -> dict[str, Any] | None:
    """Counts, and the names of failed tests, from a JUnit file; None where there is none (yet)."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def python_path(packages: Path) -> str:
    """Where to import from: the packages, this checkout, and then whatever was said before."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(packages), str(ROOT), *([before] if before else [])])


def environment(scratch: Path, packages: Path) -> dict[str, str]:
    """For every step: this checkout's packages, caches of its own, no interpreter in the GPU's place."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {
        "PYTHONPATH": python_path(packages),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }


def has_extension(packages: Path) -> bool:
    """Whether the compiled extension lies there and loads."""
    check = "from ecore_kernels import native; raise SystemExit(not native.available())"
    variables = os.environ | {"PYTHONPATH": python_path(packages)}
    found = subprocess.run([sys.executable, "-c", check], cwd=packages, env=variables, capture_output=True)
    return found.returncode == 0


def build_extension(report: Report, scratch: Path) -> Path:
    """Build the extension beside a copy of the package in ``scratch``; the folder to import from."""
    built = scratch / "packages"
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(built), "--build-temp", str(scratch / "build")]
    report.run(Step("build the extension", command, BUILD_SECONDS, required=False))
    shutil.copytree(ROOT / "kernels", built, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return built if has_extension(built) else ROOT / "kernels"


def training(*more: str) -> list[str]:
    """The command that times whole training steps at the paper's sizes."""
    return [sys.executable, "-m", "benchmarks.training", "--device", "cuda", "--preset", "paper", *more]


def checks(folder: Path, seconds: float, trains: bool) -> list[Step]:
    """What need not be alone on the machine: tests, compute-sanitizer, filling torch.compile's cache.

    ``trains``: training steps will be timed.
    """
    cores = len(os.sched_getaffinity(0))
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["--junitxml", str(folder / "tests.xml")]
    if cores >= 8 and _importable("xdist"):
        pytest += ["-n", "4"]
    steps = [Step("tests", pytest, seconds)]
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool]
            command += ["--error-exitcode", "9", sys.executable, "-m", "benchmarks.sanitize"]
            steps.append(Step(f"compute-sanitizer {tool}", command, seconds))
    if cores >= 8:
        for operator in ("graph_attention", "edge_attention", "edge_readout"):
            for precision in ("tf32", "bfloat16"):
                command = [sys.executable, "-m", "benchmarks.operators", "--device", "cuda", "--compile-only"]
                command += ["--operators", operator, "--precision", precision, "--nodes", *CACHED_NODES]
                steps.append(Step(f"compile {operator} {precision}", command, seconds, required=False))
        if trains:
            steps.append(Step("compile training", training("--compile-only"), seconds, required=False))
    return steps


def imports(module: str, variables: Mapping[str, str]) -> bool:
    """Whether a step could import ``module``."""
    command = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(command, cwd=ROOT, env=dict(variables), capture_output=True).returncode == 0


def _importable(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def default_folder(gpu: str) -> Path:
    """Where results go if nobody says."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu.lower())
    return ROOT / "benchmarks" / "results" / name


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--data", type=Path, help="a prepared folder (default: made-up training batches)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu: there is no CUDA device", file=sys.stderr)
        return 2
    started = time.monotonic()
    if str(ROOT / "kernels") not in sys.path:
        sys.path.append(str(ROOT / "kernels"))
    from benchmarks import harness

    folder = (arguments.out or default_folder(torch.cuda.get_device_name())).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        scratch, packages = Path(temporary), ROOT / "kernels"
        report = Report(folder, environment(scratch, packages), harness.machine(), started=started)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("tests.xml", "operators.json", "otsu.json", "training.json"):
            (folder / stale).unlink(missing_ok=True)
        report.write()
        if not has_extension(packages):
            packages = build_extension(report, scratch)
            report.environment = environment(scratch, packages)
        report.run(Step("installation", [sys.executable, "-m", "ecore_kernels.info"], 60.0, required=False))
        if not shutil.which("compute-sanitizer"):
            report.note("compute-sanitizer", "it is not on PATH")
        trains = imports("ecore.training.trainer", report.environment)
        report.run(*checks(folder, CHECK_SECONDS, trains))
        otsu = [
            sys.executable,
            "-m",
            "benchmarks.otsu",
            "--device",
            "cuda",
            "--out",
            str(folder / "otsu.json"),
        ]
        if has_extension(packages):
            report.run(Step("otsu", otsu, OTSU_SECONDS))
        else:
            report.note("otsu", "there is no compiled extension to compare")
        if trains:
            command = training("--out", str(folder / "training.json"))
            if (
                len(os.sched_getaffinity(0)) >= 8
            ):  # else nothing is in the cache, and compiling takes too long
                command.append("--compile")
            if arguments.data:
                command += ["--data", str(arguments.data.resolve()), "--run-steps", str(RUN_STEPS)]
            report.run(Step("training", command, TRAINING_SECONDS))
        else:
            report.note("training", "`import ecore.training.trainer` fails here")
        left = report.left()
        command = [sys.executable, "-m", "benchmarks.operators", "--device", "cuda"]
        command += ["--out", str(folder / "operators.json")]
        command += ["--seconds-budget", str(int(max(10.0, left - OVERRUN_SECONDS)))]
        report.run(Step("operators", command, left))
        report.write()
    print(f"results: {folder}")
    return int(report.failed())


if __name__ == "__main__":
    sys.exit(main())
