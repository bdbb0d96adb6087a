"""The log of a run: one JSON object a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ecore.files import atomic_path

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends to ``metrics.jsonl`` and, where TensorBoard is installed, to its events in the run folder.

    Args:
        keep_through: lines of later steps are cut off: whoever wrote them died before the next checkpoint.

    Attributes:
        no_events: why there are no events for TensorBoard; None where there are.
    """

    def __init__(self, run: Path, keep_through: int) -> None:
        path = run / METRICS
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
        self._file.write(json.dumps(finite) + "\n")
        for name, value in finite.items() if self._events else ():
            if name != "step" and value is not None:
                self._events.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Put on disk what was written, so that no checkpoint is ahead of its log."""
        os.fsync(self._file.fileno())
        if self._events:
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a line torn by a crash is left out, and so is everything after it."""
    path = run / METRICS
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _cut(path: Path, keep_through: int) -> None:
    if path.exists():
        kept = [line for line in read_metrics(path.parent) if line["step"] <= keep_through]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
