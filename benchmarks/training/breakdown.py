"""Time and memory of a training step by its parts, and their growth with batches and contexts."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.training.steps import KEPT, WITHOUT, Steps, configurations
from benchmarks.workload import Workload, made_up_batch, wait
from ecore.training.allocator import keep_freed_memory

PROFILED_STEPS = 8
PARTS = {
    "matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm", "::addmv", "::linear", "mkldnn"),
    "attention": ("scaled_dot_product", "fused_varlen_attention"),
    "dropout, sum and norm": ("fused_dropout_add_layer_norm",),
    "softmax, logarithms": (
        "fused_linear_cross_entropy",
        "softmax",
        "::exp",
        "::log",
        "::logsumexp",
        "::amax",
    ),
    "graph operators": ("ecore_kernels::",),
    "random numbers": ("bernoulli", "random_", "native_dropout"),
    "optimiser": ("_adam_", "_foreach_"),
    "filling, copying, adding": (
        "::fill_",
        "::zero_",
        "::copy_",
        "::cat",
        "::add",
        "::index",
        "::embedding",
        "::where",
    ),
}
"""Parts of a step, each with pieces of the names of its kernels; the first match counts."""


def where_time_goes(work: Workload, parts: Sequence[str], device: str = "cpu") -> dict[str, float]:
    """Seconds a step in each of :data:`PARTS`, and the rest, by PyTorch's profiler (which adds some of its own).

    On a GPU they are the GPU's, in the kernels that an operation launches.
    """
    one = Steps(work, parts, device)
    for number in range(PROFILED_STEPS):
        one.take_number(number)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for number in range(PROFILED_STEPS):
            one.take_number(number)
        wait(device)
    seconds = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in profile.key_averages():
        if event.device_type != DeviceType.CPU:  # a kernel, whose time its operation has too
            continue
        spent = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        part = next((p for p, names in PARTS.items() if any(n in event.key for n in names)), "the rest")
        seconds[part] += spent / 1e6 / PROFILED_STEPS
    return seconds


SIZES: list[tuple[int, int | None]] = [
    *((rows, None) for rows in (1, 4, 16, 64, 256)),
    *((4, words) for words in (32, 128, 512, 2048)),
]
"""Batch sizes and words of context (None: as in the data) at which growth is measured."""


def growth(work: Workload, device: str = "cpu", repeats: int = 3) -> list[dict[str, Any]]:
    """Seconds a step with all on, by batch size (real-length contexts) and by words of context."""
    one, results = Steps(work, list(WITHOUT), device), []
    for rows, words in SIZES:
        times = []
        for turn in range(repeats + 1):
            batch, tokens = made_up_batch(rows, turn, words, len(one.model.vocabulary))
            batch = batch.to(device)
            wait(device)
            begin = time.perf_counter()
            one.take(batch, tokens)
            wait(device)
            times.append((time.perf_counter() - begin) / rows)
        results.append(
            {"batch": rows, "context_words": words, "seconds_a_sample": statistics.median(times[1:])}
        )
    return results


def command(preset: str, data: Path | None, *arguments: str) -> list[str]:
    """The command of this benchmark in a process of its own."""
    of_data = [] if data is None else ["--data", str(data)]
    return [sys.executable, "-m", "benchmarks.training", "--preset", preset, *of_data, *arguments]


def begin_process(parts: Sequence[str]) -> None:
    """Set up a process that takes the steps of one configuration only."""
    if KEPT in parts:
        keep_freed_memory()


def peak_memory(preset: str, data: Path | None, configuration: str) -> float:
    """MiB that a process takes at most in 40 steps of a configuration, everything that it imports included."""
    run = command(preset, data, "--memory-of", configuration)
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return float(printed.strip().splitlines()[-1])


def peak_memory_here(work: Workload, configuration: str) -> float:
    """MiB that this process has taken at most after 40 steps of a configuration."""
    parts = configurations(True)[configuration]
    begin_process(parts)
    one = Steps(work, parts)
    for turn in range(40):
        one.take(*work.batches[turn % len(work.batches)])
    # Not getrusage: that starts from the parent's peak.
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**10
