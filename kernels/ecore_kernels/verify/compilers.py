"""Processes that compile the Triton kernels of later checks."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Sequence

from ecore_kernels import problems, triton_kernels
from ecore_kernels.problems import Problem
from ecore_kernels.verify.checks import Check, OperatorCheck
from ecore_kernels.verify.edge_checks import EdgeCheck

WORKERS = 8  # that compile at a time; each holds a CUDA context
WORKER_BYTES = 3 * 2**30


def compile_for(calls: Sequence[Problem | EdgeCheck], device: str) -> None:
    """Run calls on the Triton backend in a separate process: the compiled kernels stay in Triton's cache on disk."""
    for call in calls:
        problems.set_precision(call.precision)
        (call if isinstance(call, EdgeCheck) else OperatorCheck(call, device)).run("triton")


class Compilers:
    """Processes that compile the Triton kernels of later checks, since one process would take minutes.

    They only fill a cache: the checks run even if these processes fail.
    """

    def __init__(self, every: Sequence[Check], device: str) -> None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // WORKER_BYTES
        workers = min(WORKERS, len(os.sched_getaffinity(0)), free)
        self._pool = None
        self._jobs: dict[Problem | EdgeCheck, concurrent.futures.Future[None]] = {}
        if device != "cuda" or workers < 2 or triton_kernels.unavailable_reason():
            return
        groups: dict[Problem, list[Problem]] = {}
        for check in every:
            if isinstance(check, OperatorCheck):
                # Masks do not matter to the compiler; sizes may, by the divisors of strides.
                alike = dataclasses.replace(check.problem, nodes=0, masks="all")
                groups.setdefault(alike, []).append(check.problem)
        self._pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        for calls in groups.values():
            first = [problem for problem in calls if problem.masks == "all"]
            job = self._pool.submit(compile_for, first, device)
            self._jobs |= dict.fromkeys(calls, job)
        for check in every:
            if isinstance(check, EdgeCheck):
                self._jobs[check] = self._pool.submit(compile_for, [check], device)

    def wait_for(self, check: Check) -> None:
        """Return when the kernels of a check are compiled, or have failed to."""
        wanted = check.problem if isinstance(check, OperatorCheck) else check
        if isinstance(wanted, Problem | EdgeCheck) and wanted in self._jobs:
            concurrent.futures.wait([self._jobs[wanted]])

    def close(self) -> None:
        """Cancel what has not begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
