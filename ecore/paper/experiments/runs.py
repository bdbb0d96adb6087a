"""Executing the runs of a plan: each in its own process, several at a time, with progress over all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecore.config import PRESETS, WORD_LEVEL, ModelConfig, TrainingConfig, to_dict
from ecore.errors import InputError
from ecore.files import parse_json, read_json
from ecore.paper.experiments.plan import Run, Settings
from ecore.progress import tqdm
from ecore.training.interrupt import Interrupt
from ecore.training.journal import METRICS
from ecore.training.run_folder import read_settings

SCORES = "scores"
"""Folder of a run with its metrics and predictions: not `ecore evaluate`'s own, which may be of fewer samples."""
POLL = 0.2
"""Seconds between looks at the processes."""


@dataclass
class Outcome:
    """The result of :func:`execute`."""

    failures: dict[str, str] = field(default_factory=dict)
    """Reasons of failed runs and figures, by name."""
    interrupted: bool = False


def is_done(run: Run) -> bool:
    """Return True if a run is trained with the wanted settings and scored (scoring comes last)."""
    try:
        read_json(run.folder / SCORES / "metrics.json")
        kept = read_settings(run.folder)
    except InputError:
        return False
    return (kept.model, kept.training) == (run.model, run.training)


def commands(run: Run, settings: Settings, device: str, threads: int | None = None) -> list[str]:
    """Return the shell commands that train and score ``run`` as :func:`execute` does, in the same folder."""
    train = ["ecore", "train", "--data", run.data, "--out", run.folder, "--preset", settings.preset]
    unused = WORD_LEVEL if run.model.backbone is not None else ()
    model, training = PRESETS[settings.preset]
    pairs: list[tuple[ModelConfig | TrainingConfig, Any]] = [(run.model, model), (run.training, training)]
    for config, preset in pairs:
        for item in dataclasses.fields(config):
            name, value = item.name, getattr(config, item.name)
            # Thresholds are matched to the data already, so they are given as they are.
            if name in unused or (value == getattr(preset, name) and name != "thresholds"):
                continue
            flag = "--ablate" if name == "ablations" else "--" + name.replace("_", "-")
            if isinstance(value, bool):
                train.append(flag if value else flag.replace("--", "--no-", 1))
            elif value is not None:
                train += [flag, *(value if isinstance(value, tuple) else (value,))]
    train.append("--literal-thresholds")
    score = ["ecore", "evaluate", run.folder, "--data", run.data, "--out", run.folder / SCORES]
    score += [] if settings.limit is None else ["--limit", settings.limit]
    where = ["--device", device, *([] if threads is None else ["--threads", threads])]
    return [shlex.join(map(str, [*command, *where])) for command in (train, score)]


def steps_of(run: Run) -> int:
    """The last step that a run has logged: 0 before the first."""
    try:
        with (run.folder / METRICS).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        # A line may be cut in front, or be one that is being written.
        with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
            return int(parse_json(line, METRICS)["step"])
    return 0


def execute(
    runs: Sequence[Run],
    logs: Path,
    *,
    preset: str,
    limit: int | None = None,
    jobs: int = 1,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool = True,
) -> Outcome:
    """Train and score every run that is not done, and resume those that were interrupted.

    A run that fails does not stop the others. After Ctrl-C or SIGTERM the processes finish their step and write
    a checkpoint; a second one kills them.

    Args:
        logs: folder for what each run's process says.
        limit: samples of the test split to score; None takes all.
        jobs: processes at a time. On a CPU without ``threads`` they share its cores.
    """
    if not runs:
        return Outcome()
    waiting = deque(run for run in runs if not is_done(run))
    outcome, done = Outcome(), len(runs) - len(waiting)
    if threads is None and jobs > 1 and device == "cpu":
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    shared = {"preset": preset, "limit": limit, "device": device, "threads": threads}
    logs.mkdir(exist_ok=True)
    steps = {run.name: run.training.max_steps if is_done(run) else steps_of(run) for run in runs}
    bar = tqdm(
        total=sum(run.training.max_steps for run in runs),
        initial=sum(steps.values()),
        unit="step",
        dynamic_ncols=True,
        disable=not progress,
        # A file or a pipe keeps every refresh of the bar.
        mininterval=0.2 if sys.stderr.isatty() else 15.0,
    )
    active: list[_Process] = []
    with bar, Interrupt() as interrupt:
        try:
            while waiting or active:
                if interrupt.requested and not outcome.interrupted:
                    outcome.interrupted = True
                    waiting.clear()
                    for process in active:
                        process.stop()
                while waiting and len(active) < jobs:
                    active.append(_Process(waiting.popleft(), logs, shared))
                for process in active:
                    steps[process.run.name] = max(steps[process.run.name], steps_of(process.run))
                bar.set_description_str(f"{done} of {len(runs)} runs", refresh=False)
                bar.set_postfix_str(", ".join(process.doing() for process in active), refresh=False)
                bar.update(sum(steps.values()) - bar.n)
                for process in [p for p in active if p.ended()]:
                    active.remove(process)
                    why = process.failure()
                    if why is None:
                        done += 1
                        steps[process.run.name] = process.run.training.max_steps
                        _say(bar, f"{process.run.name}: done in {process.minutes()}")
                    elif not outcome.interrupted:
                        outcome.failures[process.run.name] = why
                        _say(bar, f"{process.run.name}: failed: {why}")
                time.sleep(POLL)
            bar.set_description_str(f"{done} of {len(runs)} runs", refresh=False)
            bar.set_postfix_str("", refresh=False)
            bar.update(sum(steps.values()) - bar.n)
        finally:
            for process in active:
                process.kill()
    return outcome


def _say(bar: tqdm[Any], text: str) -> None:
    if not bar.disable:
        bar.write(text, file=sys.stderr)


class _Process:
    """A run's process and its log."""

    def __init__(self, run: Run, logs: Path, shared: dict[str, Any]) -> None:
        self.run, self.log = run, logs / f"{run.name}.log"
        self.began = time.monotonic()
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        job = {"folder": str(run.folder), "data": str(run.data), "model": to_dict(run.model)}
        job |= {"training": to_dict(run.training), **shared}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ecore.paper.experiments.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Else the terminal's Ctrl-C would reach it twice, the second time to stop at once.
                start_new_session=True,
                close_fds=False,  # it holds the lock of the folder, should this process die before it
            )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; its log says why
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def doing(self) -> str:
        """The run's state, in words."""
        step, last = steps_of(self.run), self.run.training.max_steps
        return f"{self.run.name} {'scoring' if step >= last else f'{step:,}/{last:,}'}"

    def ended(self) -> bool:
        if self.process.poll() is None:
            return False
        self._close()
        return True

    def failure(self) -> str | None:
        """The cause of the process's failure: the last line of its log."""
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"killed by {signal.Signals(-code).name}" + (
                ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
            )
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode(errors="replace").splitlines()
        said = [line for line in lines if line.strip()]
        return said[-1].removeprefix("ecore: error: ") if said else f"exit code {code}"

    def minutes(self) -> str:
        seconds = round(time.monotonic() - self.began)
        return f"{seconds // 60} min {seconds % 60} s"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
