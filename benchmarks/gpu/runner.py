"""Processes with a limit each, and what they leave: records, a capped log, results as they arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu import report

ROOT = Path(__file__).resolve().parents[2]
PROCESS_LOG_BYTES, LOG_BYTES = 2**18, 2**22
"""Bytes of output in the log: of one process, and of all."""
END_LINES = 12
RESULTS_SECONDS = 5.0  # between two looks at results that processes are still writing
FILES = ("summary.json", "summary.md", "log.txt", "results.json")

OK, STOPPED, INTERRUPTED = "ok", "stopped at its limit", "interrupted"

_REQUESTED = threading.Event()


def interrupt_on_signals() -> None:
    """Let SIGINT (unless it is ignored) and SIGTERM raise KeyboardInterrupt, and the session remember it.

    Python drops an exception that is raised inside a destructor or a callback of the garbage collector: a session that
    remembers the signal ends at its next look at its processes.
    """
    _REQUESTED.clear()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _request)
    # Processes lead groups of their own: whoever stops this one has to reach them through it.
    signal.signal(signal.SIGTERM, _request)


def _request(*_: Any) -> NoReturn:
    _REQUESTED.set()
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Process:
    """One process.

    Attributes:
        name: in the summary; the stage's name comes before it.
        command: what to run, from the root of this checkout.
        seconds: limit, after which it gets SIGTERM, as do its children.
        patience: seconds from there to SIGKILL.
        required: ending in any other way than well is a failure.
        environment: variables that it has besides the session's.
    """

    name: str
    command: Sequence[str]
    seconds: float
    patience: float = 5.0
    required: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    process: Process
    child: subprocess.Popen[bytes]
    log: Path
    stage: str
    began: float


class Session:
    """Processes of one call of the command, and their results in a folder.

    Args:
        folder: where summary.json, summary.md, log.txt and results.json go. Other files there stay as they are.
        scratch: a temporary folder, for output and for results that a process is still writing.
        environment: variables of every process.
        machine: description of the machine, for the summary.
        seconds: limit of everything together; None for no limit.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        environment: Mapping[str, str],
        machine: Mapping[str, Any],
        seconds: float | None = None,
    ) -> None:
        self.folder, self.scratch, self.machine = folder, scratch, machine
        self.environment = environment
        self.stage = "set-up"
        self.records: list[dict[str, Any]] = []
        self.sources: dict[str, Path] = {}
        """Result files of processes, by their name in results.json."""
        self._started = time.monotonic()
        self._end = float("inf") if seconds is None else self._started + seconds
        self._stage_end = self._end
        self._running: list[_Running] = []
        self._waiting: list[Process] = []
        self._at_once = 1
        self._logs: list[bytes] = []
        self._seen: dict[str, int] = {}
        self._looked = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        for part in folder.glob("weights-*.safetensors"):
            part.unlink()
        self.write()

    def begin_stage(self, name: str, seconds: float) -> bool:
        """Start a stage's clock; False, and a failure on record, where no time is left for it."""
        self.stage = name
        self._stage_end = min(time.monotonic() + seconds, self._end)
        if self.left() > 0.0:
            return True
        self.leave_out("no time was left")
        return False

    def left(self) -> float:
        """Seconds until the stage has to end."""
        return self._stage_end - time.monotonic()

    def result(self, name: str) -> Path:
        """The file that a process should write, to appear as ``name`` in results.json."""
        return self.sources.setdefault(name, self.scratch / f"{name}.json")

    def in_background(self, processes: Sequence[Process], at_once: int) -> None:
        """Run ``processes`` beside what :meth:`run` is called with, so many at once, until :meth:`join`."""
        self._waiting += processes
        self._at_once = at_once
        self._poll()

    def join(self, seconds: float) -> None:
        """Wait for the processes in the background, for that long at most: measuring needs the machine alone."""
        end = min(time.monotonic() + seconds, self._end)
        while self._running or self._waiting:
            if time.monotonic() > end:
                for running in list(self._running):
                    self._stop(running, STOPPED)
                for process in self._waiting:
                    self._record(self.stage, process, "not started: no time was left", 0.0, b"")
                self._waiting.clear()
            self._poll()
            time.sleep(0.05)

    def run(self, *processes: Process) -> list[dict[str, Any]]:
        """Run processes at the same time, none beyond the stage's end; the records of how they ended."""
        first = len(self.records)
        mine = [self._start(replace(p, seconds=min(p.seconds, self.left()))) for p in processes]
        while any(running in self._running for running in mine):
            self._poll()
            time.sleep(0.05)
        names = {process.name for process in processes}
        return [record for record in self.records[first:] if record["step"] in names]

    def leave_out(self, why: str, name: str = "") -> None:
        """Put on record that a stage, or a process of it, is left out: a failure."""
        self._record(self.stage, Process(name or self.stage, (), 0.0), f"left out: {why}", 0.0, b"")

    def interrupt(self) -> None:
        """End every process; what is left to do is up to the caller."""
        _REQUESTED.clear()
        self._waiting.clear()
        for running in list(self._running):
            self._stop(running, INTERRUPTED)

    @property
    def failures(self) -> list[str]:
        """Names of what had to end well and did not."""
        return [r["step"] for r in self.records if r["required"] and r["outcome"] != OK]

    def write(self) -> None:
        """Write the summaries, the log and the results so far."""
        seconds = round(time.monotonic() - self._started, 1)
        self._write_results()
        summary = report.summary(self.machine, self.records, self.sources, seconds)
        report.write_json(self.folder / "summary.json", summary)
        (self.folder / "summary.md").write_text(report.markdown(summary, self.sources))
        log = b"\n".join(self._logs)
        (self.folder / "log.txt").write_bytes(shortened(log, LOG_BYTES))

    def _write_results(self) -> None:
        self._looked = time.monotonic()
        times = {name: p.stat().st_mtime_ns for name, p in self.sources.items() if p.exists()}
        if times != self._seen:
            self._seen = times
            report.write_json(self.folder / "results.json", report.collected(self.sources))

    def _start(self, process: Process) -> _Running | None:
        log = self.scratch / f"log-{len(self.records)}-{time.monotonic_ns()}"
        began = time.monotonic()
        try:
            with log.open("wb") as output:
                child = subprocess.Popen(
                    process.command,
                    cwd=ROOT,
                    env={**self.environment, **process.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._record(self.stage, process, f"did not start: {error}", 0.0, b"")
            return None
        running = _Running(process, child, log, self.stage, began)
        self._running.append(running)
        return running

    def _poll(self) -> None:
        """Record what has ended, end what is over its limit, start what waits for a place, look at results.

        Raises:
            KeyboardInterrupt: a signal asked for it, and Python dropped the exception.
        """
        if _REQUESTED.is_set():
            raise KeyboardInterrupt
        for running in list(self._running):
            code = running.child.poll()
            if code is not None:
                self._stop(running, OK if code == 0 else f"exit code {code}")
            elif time.monotonic() > min(running.began + running.process.seconds, self._end):
                self._stop(running, STOPPED)
        while self._waiting and len(self._running) < self._at_once:
            self._start(self._waiting.pop(0))
        if time.monotonic() > self._looked + RESULTS_SECONDS:
            self._write_results()

    def _stop(self, running: _Running, outcome: str) -> None:
        seconds = time.monotonic() - running.began
        end(running.child, running.process.patience)
        self._running.remove(running)
        self._record(running.stage, running.process, outcome, seconds, running.log.read_bytes())
        running.log.unlink()

    def _record(self, stage: str, process: Process, outcome: str, seconds: float, output: bytes) -> None:
        output = shortened(output, PROCESS_LOG_BYTES)
        end_of_output = output.decode(errors="replace").splitlines()[-END_LINES:]
        self.records.append(
            {
                "stage": stage,
                "step": process.name,
                "outcome": outcome,
                "required": process.required,
                "seconds": round(seconds, 1),
                "end_of_output": end_of_output,
            }
        )
        heading = f"==== {stage}: {process.name}: {outcome}, {seconds:.1f} s\n$ {' '.join(process.command)}\n"
        self._logs.append(heading.encode() + output + b"\n")
        print(report.line(self.records[-1]), flush=True)
        self.write()


def end(child: subprocess.Popen[bytes], patience: float) -> None:
    """End a process and everything that it has started: it leads a process group of its own."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, kind)
        except ProcessLookupError:
            break
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    child.poll()


def shortened(output: bytes, most: int) -> bytes:
    """``output``, its middle left out where it is longer than ``most``."""
    if len(output) <= most:
        return output
    half = most // 2
    return output[:half] + b"\n[...]\n" + output[-half:]
