"""Configurations of a training step timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import harness
from benchmarks.training.steps import Steps
from benchmarks.workload import Workload, wait
from ecore.training.cuda_graphs import Recorder

NO_TIME = "no time was left"
"""The reason given for a configuration that was not reached."""


def compare(work: Workload, named: Mapping[str, Sequence[str]], rounds: int) -> list[dict[str, Any]]:
    """Return each configuration's seconds a step, the configurations in turn on each batch; for a CPU."""
    steps = {name: Steps(work, parts) for name, parts in named.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    first: dict[str, float] = {}
    for name, one in steps.items():
        begin = time.perf_counter()
        for batch, tokens in work.batches[:2]:
            one.take(batch, tokens)
        first[name] = time.perf_counter() - begin
    for turn in range(rounds):
        batch, tokens = work.batches[turn % len(work.batches)]
        for name, one in steps.items():
            begin = time.perf_counter()
            one.take(batch, tokens)
            times[name].append(time.perf_counter() - begin)
    return [{**row, "first_two_steps_seconds": first[row["configuration"]]} for row in _summaries(times)]


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
    rows = _summaries(times)
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


def _summaries(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    plain, results = times.get("plain PyTorch"), []
    for name, seconds in times.items():
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
        results.append(
            {
                "configuration": name,
                "timing": timing,
                "mean_seconds": statistics.mean(seconds),
                "speedup_median": None if ratios is None else statistics.median(ratios),
            }
        )
    return results
