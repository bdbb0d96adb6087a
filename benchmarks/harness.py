"""Shared by all benchmarks: interleaved timing, a description of the machine, a table and a JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ecore.errors import InputError
from ecore.files import read_json
from ecore.training import allocator
from ecore_kernels import native

REPLAYED_CALLS = 8
"""Calls that one CUDA graph holds: between two graphs the GPU waits for some microseconds."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, over repeated measurements: each is the mean of ``calls`` calls in a row."""

    minimum: float
    median: float
    p20: float
    p80: float
    measurements: int
    calls: int


def interleaved(
    candidates: Mapping[str, Callable[[int], object]],
    *,
    device: str = "cpu",
    measurements: int = 25,
    seconds_each: float = 0.002,
) -> dict[str, Timing]:
    """Time the candidates in turn, round after round, so that a machine's slow moments fall on all of them.

    Args:
        candidates: what to call, by name. A call gets a running number, for rotating among inputs: given
            one input over and over, branch predictors and caches learn it by heart.
        device: "cuda" waits for the device before each look at the clock.
        measurements: rounds.
        seconds_each: a measurement repeats its call until it takes about this long.
    """

    def measure(call: Callable[[int], object], first: int, calls: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for number in range(first, first + calls):
            call(number)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, call in candidates.items():
        measure(call, 0, 2)
        calls[name] = max(1, round(seconds_each / measure(call, 2, 3)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(measurements):
        for name, call in candidates.items():
            seconds[name].append(measure(call, turn * calls[name], calls[name]))
    timings = {}
    for name, measured in seconds.items():
        p20, p80 = (statistics.quantiles(measured, n=5, method="inclusive")[i] for i in (0, 3))
        middle = statistics.median(measured)
        timings[name] = Timing(min(measured), middle, p20, p80, measurements, calls[name])
    return timings


def keep_freed_memory() -> None:
    """Let glibc keep freed memory from here on, as it does in a process that trains a model.

    It returns large blocks to the kernel, and gets them back page by page. A process that does nothing else than call
    operators would pay for that in every call, whoever is timed.
    """
    allocator.keep_freed_memory()


def replayed(call: Callable[[int], object], calls: int) -> Callable[[int], object]:
    """Return one call that replays the first ``calls`` calls as a CUDA graph, without Python between them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(calls):
            call(number)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(number) for number in range(calls)]

    def replay(number: int) -> object:
        graph.replay()
        return kept  # what the graph writes has to stay alive

    return replay


def replays(
    candidates: Mapping[str, Callable[[int], object]], left_out: dict[str, str], measurements: int = 25
) -> dict[str, Timing]:
    """Time a call of each candidate as :func:`interleaved` does, replayed from a CUDA graph of eight.

    A call from Python may take longer than its kernels; replayed, as in a recorded training step, the kernels' time is
    left. ``left_out`` gets why a candidate cannot be recorded.
    """
    graphs: dict[str, Callable[[int], object]] = {}
    for name, call in candidates.items():
        try:
            graphs[name] = replayed(call, REPLAYED_CALLS)
        except Exception as error:  # whatever one fails with, the others go on
            left_out[f"{name}, replayed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    timings = interleaved(graphs, device="cuda", measurements=measurements)
    return {
        name: dataclasses.replace(
            timing,
            **{x: getattr(timing, x) / REPLAYED_CALLS for x in ("minimum", "median", "p20", "p80")},
        )
        for name, timing in timings.items()
    }


def peak_memory(call: Callable[[int], object], device: str) -> int:
    """Bytes that a call allocates at most at any moment, beyond what was allocated before it.

    On CPU that is what PyTorch's allocator hands out, as its profiler sees it: temporary buffers of compiled
    extensions are not in it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    now = peak = 0
    for event in _traced(call, device):
        if event.get("name") == "[memory]":
            now += event["args"]["Bytes"]
            peak = max(peak, now)
    return peak


def launches(call: Callable[[int], object]) -> int:
    """Kernels, copies and fills that a call starts on the GPU."""
    return sum(e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for e in _traced(call, "cuda"))


def _traced(call: Callable[[int], object], device: str) -> list[dict[str, Any]]:
    """The events of one call, as the profiler writes them into a trace, in the order of time."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if device == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=device == "cpu") as profile:
        call(0)
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return sorted(json.loads(path.read_text())["traceEvents"], key=lambda event: event.get("ts", 0))


def machine() -> dict[str, Any]:
    """Hardware, versions and command that a result depends on."""
    description: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "triton", "numpy", "scikit-image")},
        "native": native.build_record() or native.unavailable_reason(),
        "commit": _commit(),
        "arguments": [Path(a).name if os.sep in a else a for a in sys.argv[1:]],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = torch.version.cuda
    return description


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache  # asked before the first result is written: a kept one that it replaces is no change of the code
def _commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, as Markdown."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n".join(lines)


def command(module: str) -> Callable[[Sequence[str]], int | None]:
    """Return the ``main`` that ``python -m module`` runs: a package's is in its ``__main__``."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    return found.main


def fail_for(left_out: Mapping[str, str]) -> None:
    """End with a line for each part of a benchmark that is missing from its results; go on where none is.

    Raises:
        SystemExit: with these lines, exit code 1.
    """
    if left_out:
        raise SystemExit("\n".join(f"left out: {name}: {why}" for name, why in left_out.items()))


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def memory(size: float) -> str:
    """Bytes, three digits and a unit."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB"


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results that :func:`write_json` wrote.

    Raises:
        InputError: the file is missing, damaged or holds something else.
    """
    document = read_json(path)
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise InputError(f"{path}: expected results that a benchmark wrote with --out")
    return results


def read_timed_results(path: Path) -> list[dict[str, Any]]:
    """Return the results that :func:`write_json` wrote, with ``timings`` and ``replayed`` as they were measured."""
    results = read_results(path)
    for result in results:
        for kind in ("timings", "replayed"):
            if kind in result:
                result[kind] = {name: Timing(**timing) for name, timing in result[kind].items()}
    return results


def best_timings(result: Mapping[str, Any]) -> dict[str, Timing]:
    """The timings that a table shows: on a GPU the replayed ones, without the time that Python needs for launches.

    Where the first candidate, which the others are compared with, cannot be recorded, they are of single calls.
    """
    replayed = result.get("replayed", {})
    return replayed if next(iter(result["timings"])) in replayed else result["timings"]


def collect(benchmark: str, results: Iterable[dict[str, Any]], out: Path | None) -> list[dict[str, Any]]:
    """Return all results; ``out``, if any, holds those so far as soon as each has come."""
    collected = []
    for result in results:
        collected.append(result)
        if out:
            write_json(out, benchmark, collected)
    return collected


def write_json(path: Path, benchmark: str, results: Sequence[Mapping[str, Any]]) -> None:
    """One file a run: what was measured, where, and the rows; timings become plain objects."""

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        raise TypeError(f"{type(value).__name__} does not go into JSON")

    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": benchmark, "machine": machine(), "results": list(results)}
    # Not in place: whoever reads it, or kills this process, finds the last whole file.
    written = path.with_name(path.name + ".part")
    written.write_text(json.dumps(document, indent=1, default=plain, ensure_ascii=False) + "\n")
    written.replace(path)
