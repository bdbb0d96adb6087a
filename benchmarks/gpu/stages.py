"""The stages: what each runs, in the order in which they tell most."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.environment import cores
from benchmarks.gpu.runner import INTERRUPTED, Process, Session

PAPER_STEPS = 26_000
FILL_SECONDS = 240.0
"""Limit of filling torch.compile's cache, from when the first measurement waits for it."""
CHECKPOINT_SECONDS = 60.0
"""Seconds for a training to finish its step and write a checkpoint after SIGTERM."""
EVALUATION_SHARE = 0.25
"""Of a training's time; what training does not use is added."""
OVERRUN_SECONDS = 60.0
"""Longest from a problem's start until its row is written: the operators' benchmark may overrun its budget by that."""
TUNING_SECONDS = 150.0
"""Longest round of the tuner's search, which may overrun its budget by that."""
FURTHER_OPERATORS = {"otsu": [], "step_operators": ["--compiled"], "sparse": [], "edge_options": []}
"""Benchmarks that take seconds each, by name, with their flags."""
# Sizes whose compilation is worth a cache: the larger ones need the GPU's memory for themselves.
CACHED_NODES = ("160", "288", "96", "64")
KINDS = ("tf32", "bfloat16")


@dataclass(frozen=True)
class Plan:
    """Settings of one call of the command.

    Attributes:
        data: a prepared folder; None for made-up batches.
        strategies: trainings of the stage "train".
        steps: of each training.
        keep_weights: keep those of the first training.
        rehearsal: everything on a CPU that stands in for the GPU, at tiny sizes.
    """

    data: Path | None = None
    strategies: Sequence[str] = ("soft",)
    steps: int = PAPER_STEPS
    keep_weights: bool = False
    rehearsal: bool = False

    def python(self, module: str, *arguments: str) -> list[str]:
        """The command that runs a module of this project."""
        stand_in = ["benchmarks.gpu.stand_in"] if self.rehearsal else []
        return [sys.executable, "-m", *stand_in, module, *arguments]

    @property
    def data_arguments(self) -> list[str]:
        return [] if self.data is None else ["--data", str(self.data)]


class Stage(NamedTuple):
    """A stage: its limit in minutes, the question it answers, what runs it, what fills the compiler's cache for it."""

    minutes: float
    question: str
    run: Callable[[Session, Plan], None]
    fills: Callable[[Plan], list[Process]] = lambda plan: []


def smoke(session: Session, plan: Plan) -> None:
    """Every operator against float64."""
    out = session.result("smoke")
    command = plan.python("ecore_kernels.verify", "--device", "cuda", "--out", str(out))
    session.run(Process("verify", command, session.left()))


def training_benchmark(plan: Plan, *arguments: str) -> list[str]:
    return plan.python(
        "benchmarks.training",
        "--device",
        "cuda",
        "--preset",
        "paper",
        "--compile",
        *plan.data_arguments,
        *arguments,
    )


def fill_steps(plan: Plan) -> list[Process]:
    """Processes that compile the model, one for each arithmetic and backend."""
    processes = []
    for name in ("all, torch.compile", "plain, torch.compile"):
        for kind in ("", *KINDS):
            configuration = f"{name}, {kind}" if kind else name
            command = training_benchmark(plan, "--compile-only", "--only", configuration)
            processes.append(_fill(configuration, command))
    return processes


def steps(session: Session, plan: Plan) -> None:
    """Losses of recorded against single steps, then the time of a step."""
    command = plan.python(
        "benchmarks.recorded", "--device", "cuda", "--preset", "paper", *plan.data_arguments
    )
    command += ["--out", str(session.result("losses"))]
    session.run(Process("losses of recorded steps", command, session.left() / 2))
    limit = session.left()
    command = training_benchmark(plan, "--out", str(session.result("steps")))
    # After the configurations come growth and profiles, which need a third as long.
    command += ["--seconds-budget", str(int(0.7 * limit))]
    session.run(Process("time of a step", command, limit))


def fill_operators(plan: Plan) -> list[Process]:
    """Processes that compile the operators' rivals."""
    processes = []
    for operator in ("graph_attention", "edge_attention", "edge_readout"):
        for kind in KINDS:
            command = plan.python("benchmarks.operators", "--device", "cuda", "--compile-only")
            command += ["--operators", operator, "--precision", kind, "--nodes", *CACHED_NODES]
            processes.append(_fill(f"{operator}, {kind}", command))
    return processes


def operators(session: Session, plan: Plan) -> None:
    """Times of the operators and their rivals; once more from where an error took the GPU away."""
    from benchmarks.operators.runner import LOST_DEVICE

    out = session.result("operators")
    more: list[str] = []
    further_seconds = min(200.0, session.left() / 3)
    while True:
        limit = session.left() - further_seconds
        budget = max(limit - OVERRUN_SECONDS, limit / 2)
        command = plan.python("benchmarks.operators", "--device", "cuda", "--out", str(out), *more)
        command += ["--seconds-budget", str(int(budget))]
        (record,) = session.run(Process("operators", command, limit))
        if record["outcome"] != f"exit code {LOST_DEVICE}" or session.left() < further_seconds:
            break
        more = ["--resume"]
    for number, (name, flags) in enumerate(FURTHER_OPERATORS.items()):
        command = plan.python(
            f"benchmarks.{name}", "--device", "cuda", "--out", str(session.result(name)), *flags
        )
        share = session.left() / (len(FURTHER_OPERATORS) - number)
        session.run(Process(name.replace("_", " "), command, share))


def train(session: Session, plan: Plan) -> None:
    """Whole trainings by the command line, and their scores on the test split."""
    for number, strategy in enumerate(plan.strategies):
        share = session.left() / (len(plan.strategies) - number)
        end_left = session.left() - share
        run = session.scratch / "runs" / strategy
        session.sources[f"train {strategy}"] = run / "metrics.jsonl"
        session.sources[f"evaluation {strategy}"] = run / "evaluation-test" / "metrics.json"
        command = plan.python("ecore", "train", "--out", str(run), *plan.data_arguments, "--preset", "paper")
        command += ["--strategy", strategy, "--max-steps", str(plan.steps), "--device", "cuda"]
        command += ["--cuda-graphs", "--precision", "tf32"]
        limit = (1 - EVALUATION_SHARE) * share
        session.run(Process(f"train {strategy}", command, limit, patience=CHECKPOINT_SECONDS))
        if not (run / "checkpoints.json").exists():
            session.leave_out("the training left no checkpoint", f"evaluate {strategy}")
            continue
        if plan.keep_weights and number == 0:
            command = [sys.executable, "-m", "benchmarks.gpu.weights", "split", str(run)]
            command += ["--out", str(session.folder)]
            session.run(Process(f"keep weights of {strategy}", command, CHECKPOINT_SECONDS))
        command = plan.python("ecore", "evaluate", str(run), "--device", "cuda")
        session.run(Process(f"evaluate {strategy}", command, session.left() - end_left))


def generate(session: Session, plan: Plan) -> None:
    """Times of an answer."""
    command = plan.python(
        "benchmarks.generation", "--device", "cuda", "--preset", "paper", *plan.data_arguments
    )
    command += ["--out", str(session.result("generate"))]
    session.run(Process("generation", command, session.left()))


def tests(session: Session, plan: Plan) -> None:
    """The tests that need a GPU. In a rehearsal they are collected, and skipped."""
    lines = session.sources.setdefault("tests", session.scratch / "tests.jsonl")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu.pytest_lines", "--lines", str(lines), "--continue-on-collection-errors"]
    if cores() >= 8 and importlib.util.find_spec("xdist"):
        command += ["-n", str(cores() * 5 // 8)]
    # What tells most.
    for first in ("tests/kernels/triton/test_gpu.py", "tests/kernels/triton", "tests/kernels"):
        command += ["--first", first]
    if not importlib.util.find_spec("pytest_timeout"):  # else its setting would be refused as unknown
        command += ["-o", "addopts=--import-mode=importlib"]
    session.run(Process("tests", [*command, "tests"], session.left(), environment=_few_compilers()))


def sanitize(session: Session, plan: Plan) -> None:
    """compute-sanitizer on every kernel, both tools at the same time."""
    # torch asks the driver for what may not be there: such answers are not errors of ours.
    tools = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    processes = []
    for tool, options in tools.items():
        command = ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9"]
        command += plan.python("benchmarks.sanitize")
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        processes.append(Process(tool, command, session.left(), environment=uncached))
    session.run(*processes)


def tune(session: Session, plan: Plan) -> None:
    """Launch configurations that are faster here than the table's; the table stays as it is."""
    limit = session.left()
    budget = max(limit - TUNING_SECONDS, limit / 2)
    command = plan.python(
        "benchmarks.tune", "--budget", str(int(budget)), "--out", str(session.result("tune"))
    )
    session.run(Process("tune", command, limit))


STAGES: dict[str, Stage] = {
    "smoke": Stage(4, "do the kernels run, and are they right?", smoke),
    "steps": Stage(12, "are recorded steps the same, and what does a step take?", steps, fill_steps),
    "operators": Stage(12, "what are the kernels worth beside their rivals?", operators, fill_operators),
    "train": Stage(15, "the paper's training, and its test scores", train),
    "generate": Stage(5, "what does an answer take?", generate),
    "tests": Stage(10, "do the tests that need a GPU pass?", tests),
    "sanitize": Stage(8, "does a kernel read or write what it must not?", sanitize),
    "tune": Stage(20, "which launch configurations are fastest here?", tune),
}


def run(session: Session, plan: Plan, minutes: dict[str, float]) -> None:
    """Run stages in their order; ``minutes`` has the limit of each that is to run."""
    if cores() >= 4:
        fills = [process for name in minutes for process in STAGES[name].fills(plan)]
        session.in_background(fills, at_once=cores() // 2)
    pending = list(minutes)
    try:
        while pending:
            stage = STAGES[pending[0]]
            if stage.run is not smoke:  # whose results do not depend on who else is on the machine
                session.join(FILL_SECONDS)
            if session.begin_stage(pending[0], 60.0 * minutes[pending[0]]):
                stage.run(session, plan)
            pending.pop(0)
    except KeyboardInterrupt:
        session.interrupt()
        for name in pending:
            session.stage = name
            session.leave_out(INTERRUPTED)
        raise


def _fill(name: str, command: list[str]) -> Process:
    return Process(f"compile {name}", command, FILL_SECONDS, required=False, environment=_few_compilers())


def _few_compilers() -> dict[str, str]:
    """Else every process starts a compiler for each core."""
    return {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
