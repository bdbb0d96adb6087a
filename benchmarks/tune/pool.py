"""Processes in which configurations are compiled, replaced when they hang or have lost the GPU."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Sequence

from benchmarks.tune.search import Configuration, Setting
from benchmarks.tune.trial import try_once

COMPILE_SECONDS = 60.0  # for the configurations of one round
Job = tuple[Setting, Configuration]


def _lost(why: str | None) -> bool:
    """Return True if a process that failed for this reason cannot use the GPU any more."""
    return why is not None and ("CUDA error" in why or "[CUDA]" in why)


def key(setting: Setting, configuration: Configuration) -> tuple[Setting, str]:
    """Return a job as a dictionary's key."""
    return setting, json.dumps(configuration, sort_keys=True)


class Pool:
    """Processes that compile and try; replaced if they do not come back in time, or have lost the GPU.

    Args:
        processes: how many.
        deadline: by ``time.monotonic()``, when nothing is waited for any more.
    """

    def __init__(self, processes: int, deadline: float = math.inf) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._processes = processes
        self._deadline = deadline
        self._pool = self._context.Pool(processes)
        self._known: dict[tuple[Setting, str], str] = {}

    def compile(self, jobs: Sequence[Job], seconds: float = COMPILE_SECONDS) -> list[str]:
        """Return the reason against each job, or "". A job unfinished after ``seconds`` is refused, this time."""
        fresh = [job for job in jobs if key(*job) not in self._known]
        refused = self._try(fresh, seconds)
        for index, why in enumerate(refused):
            # Who came after it in the same process was struck as well, and has another go.
            if _lost(why):
                self._replace()
                (refused[index],) = self._try([fresh[index]], seconds)
        if any(map(_lost, refused)):
            self._replace()
        answers = {key(*job): why for job, why in zip(fresh, refused, strict=True)}
        self._known |= {name: why for name, why in answers.items() if why is not None}
        late = f"took more than {seconds:.0f} s"
        return [late if (why := (self._known | answers)[key(*job)]) is None else why for job in jobs]

    def _try(self, jobs: Sequence[Job], seconds: float) -> list[str | None]:
        """As ``compile``; None for what is not done."""
        pending = [self._pool.apply_async(try_once, job) for job in jobs]
        end = min(time.monotonic() + seconds, self._deadline)
        refused: list[str | None] = []
        for result in pending:
            try:
                refused.append(result.get(max(0.0, end - time.monotonic())))
            except multiprocessing.TimeoutError:
                refused.append(None)
        if any(not result.ready() for result in pending):
            self._replace()
        return refused

    def _replace(self) -> None:
        self.close()
        self._pool = self._context.Pool(self._processes)

    def close(self) -> None:
        self._pool.terminate()
        self._pool.join()
