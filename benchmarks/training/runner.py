"""Configurations of a training step timed in turn."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from benchmarks import harness
from benchmarks.training.steps import Steps
from benchmarks.workload import Workload, wait
from ecore.training.cuda_graphs import Recorder

NO_TIME = "no time was left"
"""The reason given for a configuration that was not reached."""


class Stepper(Protocol):
    """Steps of one configuration, by the batch's number."""

    first_seconds: float
    """Of the first two steps, which allocate and compile."""

    def take(self, number: int) -> float:
        """Take a step on a batch, and return its seconds."""
        ...


class InThisProcess:
    """Steps in this process."""

    def __init__(self, work: Workload, parts: Sequence[str]) -> None:
        self._steps, self._batches = Steps(work, parts), work.batches
        self.first_seconds = self.take(0) + self.take(1)

    def take(self, number: int) -> float:
        batch, tokens = self._batches[number % len(self._batches)]
        begin = time.perf_counter()
        self._steps.take(batch, tokens)
        return time.perf_counter() - begin


class InOwnProcess:
    """Steps in a process of its own, as a training has one.

    In one process, memory that the allocator keeps for one configuration also serves the others, and speeds them up.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """``command`` runs :func:`serve`.

        Raises:
            ProcessEndedError: it ended before its first steps.
        """
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first_seconds = self._read()

    def take(self, number: int) -> float:
        """Take a step.

        Raises:
            ProcessEndedError: the process has ended.
        """
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(number, file=self._child.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()

    def _read(self) -> float:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(ANSWER):
                return float(line.removeprefix(ANSWER))
        raise ProcessEndedError(f"its process ended with exit code {self._child.wait()}")


class ProcessEndedError(Exception):
    """A configuration's process has ended; the message has its exit code."""


ANSWER = "seconds: "


def serve(steps: Stepper, numbers: Iterable[str]) -> None:
    """Answer :class:`InOwnProcess`: print the first seconds, then for each number read those of its step."""
    print(f"{ANSWER}{steps.first_seconds}", flush=True)
    for number in numbers:
        print(f"{ANSWER}{steps.take(int(number))}", flush=True)


def compare(
    starts: Mapping[str, Callable[[], Stepper]], rounds: int, plain: str = "plain PyTorch"
) -> list[dict[str, Any]]:
    """Return each configuration's seconds a step, in turn with those of ``plain`` on the same batches; for a CPU.

    One after the other is made ready, takes its steps and is closed: two processes at a time need memory, and what is
    compared lies side by side in time.

    Args:
        starts: what makes each configuration ready, by name. One whose process ends is reported, the others go on.
        plain: the name of what the others are compared with; without it there are no ratios.
    """
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    with contextlib.ExitStack() as of_all:
        first = _ready(plain, starts, of_all, refused)
        of_first: list[float] = []
        for name in starts:
            if name == plain:
                continue
            with contextlib.ExitStack() as of_one:
                one = _ready(name, starts, of_one, refused)
                if one is None:
                    continue
                seconds, beside = [], []
                try:
                    for turn in range(rounds):
                        if first is not None:
                            beside.append(first.take(turn))
                        seconds.append(one.take(turn))
                except ProcessEndedError as error:
                    refused[name] = str(error)
                    continue
                finally:
                    of_first += beside
                rows.append(
                    _summary(name, seconds, beside or None) | {"first_two_steps_seconds": one.first_seconds}
                )
        if first is not None:
            of_first = of_first or [first.take(turn) for turn in range(rounds)]
            rows.insert(
                0,
                _summary(plain, of_first, of_first) | {"first_two_steps_seconds": first.first_seconds},
            )
    return [*rows, *({"configuration": name, "refused": why} for name, why in refused.items())]


def _ready(
    name: str,
    starts: Mapping[str, Callable[[], Stepper]],
    held: contextlib.ExitStack,
    refused: dict[str, str],
) -> Stepper | None:
    """Start a configuration, which ``held`` closes; None, and the reason in ``refused``, where that fails."""
    if name not in starts:
        return None
    try:
        one = starts[name]()
    except ProcessEndedError as error:
        refused[name] = str(error)
        return None
    if isinstance(one, InOwnProcess):
        held.callback(one.close)
    return one


def compare_passes(
    work: Workload,
    named: Mapping[str, Sequence[str]],
    passes: int,
    device: str,
    recorder: Recorder | None = None,
    budget: float | None = None,
) -> list[dict[str, Any]]:
    """Return each configuration's seconds a step over passes over all batches, in turn; for a GPU.

    It is looked at after a pass and not after each step, for a training does not wait for its steps either.

    Args:
        budget: seconds; after half of them no further configuration is made ready, and after all no pass is begun.
    """
    began = time.perf_counter()

    def spent(share: float) -> bool:
        return budget is not None and time.perf_counter() - began > share * budget

    steps: dict[str, Steps] = {}
    first: dict[str, float] = {}
    memory: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, parts in named.items():
        if spent(0.5):
            refused[name] = NO_TIME
            continue
        begin, before = time.perf_counter(), _allocated(device)
        try:
            one = Steps(work, parts, device, recorder)
            one.warm_up()
        except Exception as error:  # whatever one fails with, the others go on
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            continue
        steps[name] = one
        first[name] = time.perf_counter() - begin
        memory[name] = (_allocated(device, peak=True) - before) / 2**20
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(passes):
        if turn >= 2 and spent(1.0):
            break
        for name, one in steps.items():
            wait(device)
            begin = time.perf_counter()
            for number in range(len(work.batches)):
                one.take_number(number)
            wait(device)
            times[name].append((time.perf_counter() - begin) / len(work.batches))
    rows = [_summary(name, seconds, times.get("plain PyTorch")) for name, seconds in times.items()]
    for row in rows:
        name = row["configuration"]
        row |= {"warm_up_seconds": first[name], "peak_memory_mib": memory[name]}
    return [*rows, *({"configuration": name, "refused": why} for name, why in refused.items())]


def _allocated(device: str, peak: bool = False) -> int:
    """Bytes allocated on a GPU: now, from where peaks count anew, or at most since; 0 on a CPU."""
    if device == "cpu":
        return 0
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _summary(name: str, seconds: Sequence[float], plain: Sequence[float] | None) -> dict[str, Any]:
    """A configuration's row; ``plain`` has plain PyTorch's seconds of the same steps."""
    p20, p80 = (statistics.quantiles(seconds, n=5, method="inclusive")[i] for i in (0, 3))
    timing = harness.Timing(
        median=statistics.median(seconds),
        minimum=min(seconds),
        p20=p20,
        p80=p80,
        measurements=len(seconds),
        calls=1,
    )
    ratios = None if plain is None else [a / b for a, b in zip(plain, seconds, strict=True)]
    return {
        "configuration": name,
        "timing": timing,
        "mean_seconds": statistics.mean(seconds),
        "speedup_median": None if ratios is None else statistics.median(ratios),
        "speedup_quartiles": None
        if ratios is None
        else statistics.quantiles(ratios, n=4, method="inclusive")[::2],
        "speedup_of_means": None if plain is None else statistics.mean(plain) / statistics.mean(seconds),
    }
