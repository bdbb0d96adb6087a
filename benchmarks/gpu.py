"""Everything that needs a GPU, in one command of nine minutes: tests, compute-sanitizer, benchmarks.

    python -m benchmarks.gpu [--out FOLDER] [--data PREPARED]

With a prepared folder whole training steps are timed on its batches, else on made-up ones, and models trained on
it. A test that needs a package which is missing fails alone.
Results go to FOLDER; without one, to the folder that $OUT names, else to benchmarks/results/NAME-OF-THE-GPU.
Nothing has to be installed but torch, triton and pytest: the packages are imported from this checkout, and the
compiled extension is built into a temporary folder if it is missing (and done without if that fails). Training
steps are left out where what `ecore` needs besides is missing.

First come the things that need not be alone on the machine, at the same time: the tests marked ``gpu``,
compute-sanitizer's memcheck and racecheck on ``benchmarks.sanitize``, and processes that fill torch.compile's
cache, for compiling takes longer than measuring. Then the benchmarks, one after the other, the operators first.
Every step is a process of its own with a share of the time; one that fails or hangs is written down, and the next
goes on. summary.json, summary.md and log.txt are written anew after every step, tests.jsonl after every test,
operators.json after every row.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 540.0
RESERVE_SECONDS = 12.0  # for writing and for processes that take their time to end
BUILD_SECONDS, CHECK_SECONDS, TRAINING_SECONDS, RUNS_SECONDS, OTSU_SECONDS = 90.0, 150.0, 80.0, 70.0, 25.0
# Of each whole training; enough to record nearly all shapes and for two validations. The rest is estimated.
RUN_STEPS = 4000
# The training benchmark's: that much earlier than it is stopped it begins nothing new.
TRAINING_SLACK = 25.0
# From a problem's start until its rows are written: what the operators' benchmark may overrun its budget by.
OVERRUN_SECONDS = 45.0
LOG_BYTES = 2**20  # of each step's output
LARGEST_FILE = 15 * 2**20
WRITTEN = ("operators", "training", "runs", "otsu")
"""Results in the folder, NAME.json each."""
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
        tests = test_results(self.folder / "tests.jsonl")
        seconds = round(time.monotonic() - self.started, 1)
        summary = {"machine": self.machine, "seconds": seconds, "tests": tests, "steps": self.records}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        (self.folder / "summary.md").write_text(self._markdown(tests, seconds))
        (self.folder / "log.txt").write_text("\n".join(self.logs))
        for name in WRITTEN:  # and nothing else: the folder may hold what is not ours
            # Of a step that was stopped while it wrote.
            (self.folder / f"{name}.json.part").unlink(missing_ok=True)
            file = self.folder / f"{name}.json"
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
            lines += [f"- {name}: {why}" for name, why in tests["failed"].items()]
        for record in self.records:
            if record["required"] and record["outcome"] != "ok":
                lines += [
                    f"\n## {record['step']}: the end of its output\n",
                    "```",
                    *record["end_of_output"],
                    "```",
                ]
        for name, report in REPORTS.items():
            results = self.folder / f"{name}.json"
            if results.exists():
                try:
                    lines += ["", report(results)]
                except Exception as error:  # not for a table's sake is all the rest lost
                    lines += ["", f"{results.name}: {type(error).__name__}: {error}"]
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


def _operators(path: Path) -> str:
    from benchmarks import operators

    return operators.report(operators.load(path))


def _training(path: Path) -> str:
    from benchmarks import training_report

    return training_report.report(json.loads(path.read_text())["results"][0])


def _runs(path: Path) -> str:
    from benchmarks import whole_run

    return whole_run.report(json.loads(path.read_text())["results"])


# What tells a step's results, by the name of their file. What they import needs this checkout's packages.
REPORTS: dict[str, Callable[[Path], str]] = {"operators": _operators, "training": _training, "runs": _runs}


def test_results(path: Path) -> dict[str, Any] | None:
    """Counts, and why tests failed, from the lines written so far; None where there are none (yet)."""
    if not path.exists():
        return None
    outcomes: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last one may be torn
            told = json.loads(line)
            if outcomes.get(told["test"], {}).get("outcome") != "failed":
                outcomes[told["test"]] = told
    failed = {name: told for name, told in outcomes.items() if told["outcome"] == "failed"}
    skipped = sum(told["outcome"] == "skipped" for told in outcomes.values())
    return {
        "passed": len(outcomes) - len(failed) - skipped,
        "skipped": skipped,
        "failed": {name: (told["why"].strip().splitlines() or [""])[-1] for name, told in failed.items()},
    }


def python_path(packages: Path) -> str:
    """Where to import from: the packages, this checkout, and then whatever was said before."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(packages), str(ROOT), *([before] if before else [])])


def environment(scratch: Path, packages: Path) -> dict[str, str]:
    """For every step: this checkout's packages, caches of its own, no interpreter in the GPU's place."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {
        # CMake and Ninja may lie beside this Python alone.
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": python_path(packages),
        "PYTHONUNBUFFERED": "1",
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
    made = scratch / "build"
    # Straight by CMake: setup.py wants a newer setuptools than may be there.
    configure = ["cmake", "-S", str(ROOT), "-B", str(made), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={built / 'ecore_kernels'}"]
    nvcc = Path("/usr/local/cuda/bin/nvcc")
    if not shutil.which("nvcc") and nvcc.exists():
        configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    script = f"{shlex.join(configure)} && {shlex.join(['cmake', '--build', str(made)])}"
    command = ["sh", "-c", script]
    report.run(Step("build the extension", command, BUILD_SECONDS, required=False))
    shutil.copytree(ROOT / "kernels", built, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return built if has_extension(built) else ROOT / "kernels"


def training(data: Path | None, *more: str) -> list[str]:
    """The command that times whole training steps at the paper's sizes."""
    command = [sys.executable, "-m", "benchmarks.training", "--device", "cuda", "--preset", "paper", *more]
    return command + (["--data", str(data)] if data else [])


def checks(folder: Path, seconds: float, trains: bool, data: Path | None = None) -> list[Step]:
    """What need not be alone on the machine: tests, compute-sanitizer, filling torch.compile's cache.

    ``trains``: training steps will be timed, on ``data`` where that is given.
    """
    cores = len(os.sched_getaffinity(0))
    few = ["env", "TORCHINDUCTOR_COMPILE_THREADS=2"]  # else every process starts one a core
    pytest = [*few, sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["-p", "benchmarks.pytest_lines", "--lines", str(folder / "tests.jsonl")]
    pytest += ["--continue-on-collection-errors"]
    if cores >= 8 and _importable("xdist"):
        pytest += ["-n", str(cores * 5 // 8)]
    # What tells most.
    for first in ("tests/kernels/triton/test_gpu.py", "tests/kernels/triton", "tests/kernels"):
        pytest += ["--first", first]
    if not _importable("pytest_timeout"):  # else its setting in pyproject.toml would be refused as unknown
        pytest += ["-o", "addopts=--import-mode=importlib"]
    pytest += ["tests"]
    steps = [Step("tests", pytest, seconds)]
    if shutil.which("compute-sanitizer"):
        # torch asks the driver for what may not be there: such answers are not errors of ours.
        tools = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
        for tool, options in tools.items():
            command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool]
            command += [*options, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.sanitize"]
            steps.append(Step(f"compute-sanitizer {tool}", command, seconds))
    if cores >= 8:
        for operator in ("graph_attention", "edge_attention", "edge_readout"):
            for precision in ("tf32", "bfloat16"):
                command = [*few, sys.executable, "-m", "benchmarks.operators", "--device", "cuda"]
                command += ["--compile-only", "--operators", operator, "--precision", precision]
                command += ["--nodes", *CACHED_NODES]
                steps.append(Step(f"compile {operator} {precision}", command, seconds, required=False))
        if trains:
            command = [*few, *training(data, "--compile-only")]
            steps.append(Step("compile training", command, seconds, required=False))
    return steps


def measure_operators(report: Report, folder: Path, reserved: float) -> None:
    """Time the operators until ``reserved`` seconds are left; once more from where an error took the GPU away."""
    from benchmarks import operators

    more: list[str] = []
    while True:
        left = report.left() - reserved
        command = [sys.executable, "-m", "benchmarks.operators", "--device", "cuda"]
        command += ["--out", str(folder / "operators.json"), *more]
        command += ["--seconds-budget", str(int(max(10.0, left - OVERRUN_SECONDS)))]
        report.run(Step("operators", command, left))
        if report.records[-1]["outcome"] != f"exit code {operators.LOST_DEVICE}":
            return
        more = ["--resume"]


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

    data = None if arguments.data is None else arguments.data.resolve()
    if data is not None and not (data / "meta.json").exists():
        print(f"gpu: --data: {arguments.data}: expected a folder made by `ecore prepare`", file=sys.stderr)
        return 2
    folder = (arguments.out or default_folder(torch.cuda.get_device_name())).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        scratch, packages = Path(temporary), ROOT / "kernels"
        report = Report(folder, environment(scratch, packages), harness.machine(), started=started)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("tests.jsonl", "otsu.json", *(f"{name}.json" for name in REPORTS)):
            (folder / stale).unlink(missing_ok=True)
        report.write()
        if not has_extension(packages):
            packages = build_extension(report, scratch)
            report.environment = environment(scratch, packages)
        report.run(Step("installation", [sys.executable, "-m", "ecore_kernels.info"], 60.0, required=False))
        if not shutil.which("compute-sanitizer"):
            report.note("compute-sanitizer", "it is not on PATH")
        trains, compiled = imports("ecore.training.trainer", report.environment), has_extension(packages)
        report.run(*checks(folder, CHECK_SECONDS, trains, data))
        after = (TRAINING_SECONDS if trains else 0.0) + (RUNS_SECONDS if trains and data else 0.0)
        measure_operators(report, folder, after + (OTSU_SECONDS if compiled else 0.0))
        if trains:
            command = training(data, "--out", str(folder / "training.json"))
            command += ["--seconds-budget", str(int(TRAINING_SECONDS - TRAINING_SLACK))]
            # Else nothing is in the cache, and compiling takes too long.
            if len(os.sched_getaffinity(0)) >= 8:
                command.append("--compile")
            report.run(Step("training", command, TRAINING_SECONDS))
        else:
            report.note("training", "`import ecore.training.trainer` fails here")
        if trains and data:
            command = [sys.executable, "-m", "benchmarks.whole_run", "--device", "cuda", "--data", str(data)]
            command += ["--preset", "paper", "--steps", str(RUN_STEPS), "--out", str(folder / "runs.json")]
            report.run(Step("whole trainings", command, RUNS_SECONDS))
        if compiled:
            command = [sys.executable, "-m", "benchmarks.otsu", "--device", "cuda"]
            command += ["--out", str(folder / "otsu.json")]
            report.run(Step("otsu", command, OTSU_SECONDS))
        else:
            report.note("otsu", "there is no compiled extension to compare")
        report.write()
    print(f"results: {folder}")
    return int(report.failed())


if __name__ == "__main__":
    sys.exit(main())
