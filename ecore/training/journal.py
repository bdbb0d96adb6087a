"""The record of a run's steps: sums since the last line, the line that waits for a validation, the log."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecore.errors import InputError
from ecore.files import atomic_path, names_file, parse_json, read_bytes
from ecore.model.losses import Losses
from ecore.training.checkpoint import Progress
from ecore.training.distributed import Processes
from ecore.training.tracker import Tracker

METRICS = "metrics.jsonl"
TERMS = ("generation", "emotion", "correlation", "total")
"""The losses, parts before their sum: the first that is not finite is the one to name."""
SUMS = (*TERMS, "nll", "tokens", "correct")
"""Values added up for the log: means over a batch, then sums over it."""


def sums(losses: Losses, share: float) -> Tensor:
    """:data:`SUMS` of one process's part of a batch, such that the processes' add up to the batch's; [7]."""
    values = torch.stack([getattr(losses, name).detach().float() for name in SUMS])
    if share == 1.0:
        return values
    means = len(TERMS)
    return torch.cat([values[:means] * share, values[means:] * (share > 0)])


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that this process has held: its tensors' on a GPU, else all that is resident; in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB


class NotFiniteLoss(NamedTuple):
    """The first loss that is not finite: which one, its value, and how many batches came after it."""

    name: str
    value: float
    later: int


class Journal:
    """The record of a run's steps, most of which lies in ``progress`` and so in checkpoints, too.

    Losses stay on the device until :meth:`settle`, because looking at them makes the host wait for it. A line is made
    with :meth:`note` and written with :meth:`write`: in between it may gain the results of a validation.
    """

    def __init__(
        self, run: Path, progress: Progress, processes: Processes, tracker: Tracker | None = None
    ) -> None:
        self._run, self._progress, self._processes, self._tracker = run, progress, processes, tracker
        self._rows: list[Tensor] = []
        self._log: MetricsLog | None = None
        self.restart_clock()

    def open(self) -> None:
        """Open the log, in the first process alone; lines that are to be written again are cut off."""
        if self._processes.first:
            self._log = MetricsLog(self._run, self._progress.step - (self.waiting is not None), self._tracker)

    @property
    def no_events(self) -> str | None:
        """The reason for missing TensorBoard events; None where they exist, or this process writes none."""
        return None if self._log is None else self._log.no_events

    # Sums

    def restart_clock(self) -> None:
        """Restart the time count: the time before does not belong to steps."""
        self._clock = time.perf_counter()

    def count(self, **amounts: float) -> None:
        """Add to sums by name."""
        window = self._progress.window
        for name, amount in amounts.items():
            window[name] = window.get(name, 0.0) + amount

    def add(self, row: Tensor) -> None:
        """Take in a batch's :func:`sums`."""
        self._rows.append(row)

    def settle(self) -> NotFiniteLoss | None:
        """Look at the batches' sums and add them up, until one is not finite."""
        rows = self._processes.sum(torch.stack(self._rows)).tolist() if self._rows else []
        self._rows = []
        now = time.perf_counter()
        self.count(seconds=now - self._clock)
        self._clock = now
        for i, row in enumerate(rows):
            values = dict(zip(SUMS, row, strict=True))
            for name in TERMS:
                if not math.isfinite(values[name]):
                    return NotFiniteLoss(name, values[name], len(rows) - 1 - i)
            self.count(**values)
        return None

    def averages(self) -> dict[str, float]:
        """Losses and speed over the window; the share of correct emotions in percent."""
        total = self._progress.window
        return {
            "loss": total["total"] / total["batches"],
            "generation": total["generation"] / total["batches"],
            "emotion": total["emotion"] / total["batches"],
            "correlation": total["correlation"] / total["batches"],
            "nll_per_token": total["nll"] / total["tokens"],
            "emotion_accuracy": 100 * (total["correct"] / total["samples"]),
            "samples_per_second": total["samples"] / total["seconds"],
            "seconds_per_step": total["seconds"] / total["steps"],
        }

    def begin_window(self) -> None:
        """Begin new sums."""
        self._progress.window = {}

    # Lines

    @property
    def waiting(self) -> dict[str, Any] | None:
        """The line that is not yet written."""
        return self._progress.line

    def note(self, line: dict[str, Any]) -> None:
        """Let ``line`` wait to be written."""
        self._progress.line = line

    def reopen(self, make: Callable[[], dict[str, Any]]) -> bool:
        """Let the line of the present step wait again, which has become the last one and so is to be validated.

        Every process calls it.

        Args:
            make: makes the line of the sums, where the log has none.

        Returns:
            Whether a line waits again: not where the step was validated after all, which older checkpoints do not
            record.
        """
        progress = self._progress
        if progress.validated == progress.step or self.waiting is not None:
            return False
        line: dict[str, Any] | None = None
        if self._processes.first:
            logged = self.logged(progress.step)
            if logged is None and progress.window:
                line = make()
            elif logged is not None and "valid_ppl" not in logged:
                line = logged
        reopened = self._processes.any(line is not None)
        if reopened:
            self.note(line or {"step": progress.step})  # the first process's is what is logged
        return reopened

    def write(self, **results: float) -> None:
        """Write the waiting line, with ``results`` of a validation."""
        if self._progress.line is not None and self._log is not None:
            self._log.write(self._progress.line | results)
        self._progress.line = None

    def logged(self, step: int) -> dict[str, Any] | None:
        """Return the line of ``step`` in the log; None where it has none."""
        return next((line for line in reversed(read_metrics(self._run)) if line["step"] == step), None)

    def sync(self) -> None:
        """Put on disk what was written, so that no checkpoint is ahead of its log."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()


_CRC = re.compile(rb', "crc32": (\d{1,10})}\Z')
"""End of a line of the log. A member crc32 anywhere else is a copy and is not checked."""


class MetricsLog:
    """Appends to ``metrics.jsonl``, to TensorBoard's events in the run folder where it is installed, and to a tracker.

    Each line ends with a member ``crc32``, of all that precedes it; :func:`read_metrics` checks it and leaves it
    out.

    Args:
        keep_through: lines of later steps are cut off: the process that wrote them died before the next checkpoint.
        tracker: gets the numbers, too.

    Attributes:
        no_events: why there are no events for TensorBoard; None where there are.
    """

    def __init__(self, run: Path, keep_through: int, tracker: Tracker | None = None) -> None:
        self._tracker = tracker
        self._path = path = run / METRICS
        _cut(path, keep_through)
        # Line-buffered: a killed process loses no line that it has written.
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._events: Any = None
        self.no_events: str | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.no_events = str(error)
        else:
            self._events = SummaryWriter(str(run), purge_step=keep_through + 1 if keep_through else None)

    def write(self, line: dict[str, Any]) -> None:
        """Append one logged step; numbers that are not finite become null, as JSON has no word for them."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        body = json.dumps(finite).removesuffix("}")
        with names_file(self._path):
            self._file.write(f'{body}, "crc32": {zlib.crc32(body.encode())}}}\n')
        numbers = {name: value for name, value in finite.items() if name != "step" and value is not None}
        for name, value in numbers.items() if self._events else ():
            self._events.add_scalar(name, value, line["step"])
        if self._tracker is not None:
            self._tracker.log(numbers, line["step"])

    def sync(self) -> None:
        """Put on disk what was written, so that no checkpoint is ahead of its log."""
        os.fsync(self._file.fileno())
        if self._events:
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()
        if self._tracker is not None:
            self._tracker.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, but for a last one that a crash tore; none where there is no log.

    Raises:
        InputError: any other damage, by its line.
    """
    return [line for line, _ in _read(run / METRICS)]


def _read(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Return each line as a value and as it is written."""
    *texts, torn = read_bytes(path).split(b"\n") if path.exists() else [b""]
    if b"}" in torn:  # a whole line without its end is none that a crash tore
        texts.append(torn)
    lines = []
    for number, text in enumerate(texts, 1):
        where = f"{path}:{number}"
        line = parse_json(text, where)
        crc = _CRC.search(text)
        if crc is not None and zlib.crc32(text[: crc.start()]) != int(crc[1]):
            raise InputError(
                f"{where}: damaged: the line does not fit its crc32 (if you changed it, delete crc32)"
            )
        step = line.get("step") if isinstance(line, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            raise InputError(
                f"{where}: not a line of a run's log; expected an object with the whole number step"
            )
        line.pop("crc32", None)
        for name, value in line.items():
            if not isinstance(value, int | float | None):
                raise InputError(f"{where}: {name}: expected a number, got {repr(value)[:40]}")
        lines.append((line, text + b"\n"))
    return lines


def _cut(path: Path, keep_through: int) -> None:
    """Cut off lines of later steps, and a torn one; a log that is damaged otherwise is refused, and stays."""
    if not path.exists():
        return
    kept = [text for line, text in _read(path) if line["step"] <= keep_through]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(kept))
