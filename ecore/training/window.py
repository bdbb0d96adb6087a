"""What the log's next line is about: sums over the steps since the last one."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ecore.model.losses import Losses
from ecore.training.checkpoint import Progress
from ecore.training.distributed import Processes

TERMS = ("generation", "emotion", "correlation", "total")
"""The losses, parts before their sum: the first that is not finite is the one to name."""
SUMS = (*TERMS, "nll", "tokens", "correct")
"""What is added up for the log: means over a batch, then sums over it."""


def sums(losses: Losses, share: float) -> Tensor:
    """:data:`SUMS` of one process's part of a batch, such that the processes' add up to the batch's; [7]."""
    values = torch.stack([getattr(losses, name).detach().float() for name in SUMS])
    means = len(TERMS)
    return torch.cat([values[:means] * share, values[means:] * (share > 0)])


class NotFiniteLoss(NamedTuple):
    """The first loss that is not finite: which one, its value, and how many batches came after it."""

    name: str
    value: float
    later: int


class Window:
    """Sums since the log's last line, which lie in ``progress.window`` and so in checkpoints too.

    Losses stay on the device until :meth:`settle`, because looking at them makes the host wait for it.
    """

    def __init__(self, progress: Progress, processes: Processes) -> None:
        self._progress, self._processes = progress, processes
        self._pending: list[Tensor] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Time until now is not the steps'."""
        self._clock = time.perf_counter()

    def count(self, **amounts: float) -> None:
        """Add to sums by name."""
        window = self._progress.window
        for name, amount in amounts.items():
            window[name] = window.get(name, 0.0) + amount

    def add(self, row: Tensor) -> None:
        """Take in a batch's :func:`sums`."""
        self._pending.append(row)

    def settle(self) -> NotFiniteLoss | None:
        """Look at the batches' sums and add them up, until one is not finite."""
        rows = self._processes.sum(torch.stack(self._pending)).tolist() if self._pending else []
        self._pending = []
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

    def close(self) -> None:
        """Begin a new window."""
        self._progress.window = {}
