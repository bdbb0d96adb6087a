"""A whole training step: what it costs, what each improvement is worth, where its time goes, how it grows.

``python -m benchmarks.training [--data PREPARED] [--preset released] [--device cpu] [--out FILE.json]``

Times are of forward, backward and optimiser on batches of 16, in u (benchmarks/workload.py) and in seconds. The
improvements are taken out one by one by putting back what PyTorch offers in their place; configurations run in turn,
step by step, on the same batches. Peak memory is of a process of its own for each.

On a GPU (``--device cuda``) they run in turn pass by pass over the batches, which lie there; steps as CUDA graphs
gather theirs. Compilation and recording are before the clock starts, and told beside it. ``--run-steps N`` adds whole
trainings on PREPARED, validation and checkpoints included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType

from benchmarks import harness
from benchmarks.training_report import plot, report
from benchmarks.whole_run import whole_runs
from benchmarks.workload import Workload, made_up_batch, unit, wait, workload
from ecore.data.batches import Batch
from ecore.model import ecore as model_module
from ecore.model.dropout import Dropout
from ecore.model.encoder import Embedding
from ecore.training.captured import CapturedStep, CudaGraphs, Recorder, Taken
from ecore.training.objective import objective
from ecore.training.precision import autocast
from ecore.training.schedule import adam
from ecore_kernels import use_backend


def _plain_losses(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    label_smoothing: float,
    scale: float,
    copying: None,
) -> tuple[Tensor, Tensor]:
    log_probability = F.log_softmax(F.linear(states, weight, bias), dim=-1, dtype=torch.float32)
    nll = -log_probability.gather(1, targets[:, None])[:, 0]
    smoothed = (1.0 - label_smoothing) * nll - label_smoothing * log_probability.mean(-1)
    return scale * smoothed.sum(), nll.detach()


def _plain_look_up(self: Embedding, *words: Tensor) -> list[Tensor]:
    return [self.word(ids) * self.scale for ids in words]


WITHOUT: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "fused graph operators": lambda: use_backend("reference"),
    "chunked vocabulary loss": lambda: mock.patch.object(model_module, "vocabulary_losses", _plain_losses),
    "one look-up of words": lambda: mock.patch.object(Embedding, "look_up", _plain_look_up),
    "quick dropout masks": lambda: mock.patch.object(Dropout, "forward", nn.Dropout.forward),
    "fused optimiser": contextlib.nullcontext,  # chosen when the optimiser is made
}
"""Each improvement, and how it is taken out: plain PyTorch in its place."""


class Steps:
    """Training steps of one configuration.

    Args:
        work: model and batches.
        parts: improvements that are on, of :data:`WITHOUT`, and "bfloat16", "torch.compile" or "CUDA graphs".
        device: "cpu" or "cuda".
        recorder: what records steps; None makes CUDA graphs.
        **settings: of the model.
    """

    def __init__(
        self,
        work: Workload,
        parts: Sequence[str],
        device: str = "cpu",
        recorder: Recorder | None = None,
        **settings: Any,
    ) -> None:
        self.off = [take_out for name, take_out in WITHOUT.items() if name not in parts]
        self.device, self.model = device, work.model(**settings).to(device)
        if "fused optimiser" in parts:
            self.optimizer = adam(self.model.parameters())
        else:
            self.optimizer = torch.optim.Adam(
                self.model.parameters(), betas=(0.9, 0.98), eps=1e-9, foreach=True
            )
        self.optimizer.param_groups[0]["lr"] = 1e-4
        self.precision = "bfloat16" if "bfloat16" in parts else "float32"
        self.loss = objective(self.model, "torch.compile" in parts, processes=1)
        self._rows = work.rows
        self._batches = [(batch.to(device), tokens) for batch, tokens in work.batches]
        self._captured: CapturedStep | None = None
        if "CUDA graphs" in parts:
            records = recorder or CudaGraphs(torch.device(device))
            samples = work.samples(device)
            self._captured = CapturedStep(samples, len(work.rows[0]), self._step, self.optimizer, records)

    def take(self, batch: Batch, tokens: int) -> Tensor:
        """One step; the loss, detached."""
        return self._step(batch, tokens).sums

    def take_number(self, number: int) -> Tensor:
        """The same on the workload's batch of that number, round and round."""
        if self._captured is not None:
            return self._captured(self._rows[number % len(self._rows)]).sums
        return self.take(*self._batches[number % len(self._batches)])

    def warm_up(self) -> None:
        """Compile, record and have all that is made once, whatever batch comes."""
        for number in range((2 if self._captured is not None else 1) * len(self._batches)):
            self.take_number(number)
        wait(self.device)

    def _step(self, batch: Batch, tokens: int) -> Taken:
        with contextlib.ExitStack() as stack:
            for take_out in self.off:
                stack.enter_context(take_out())
            with autocast(self.device, self.precision, keep_casts=self._captured is None):
                losses = self.loss(batch, False, tokens)
            losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(losses.total.detach(), {})


def configurations(with_compile: bool, device: str = "cpu") -> dict[str, list[str]]:
    """Plain PyTorch, each improvement alone, all together, all in bfloat16; on a GPU also recorded."""
    alone = [part for part in WITHOUT if part != "quick dropout masks" or device == "cpu"]
    named: dict[str, list[str]] = {"plain PyTorch": [], **{f"+ {part}": [part] for part in alone}}
    named["all"] = list(WITHOUT)
    named["all, bfloat16"] = [*WITHOUT, "bfloat16"]
    if device == "cuda":
        named["all, CUDA graphs"] = [*WITHOUT, "CUDA graphs"]
        named["all, CUDA graphs, bfloat16"] = [*WITHOUT, "CUDA graphs", "bfloat16"]
    if with_compile:
        named["all, torch.compile"] = [*WITHOUT, "torch.compile"]
    if with_compile and device == "cuda":
        named["plain, torch.compile"] = ["torch.compile"]
        named["all, torch.compile, CUDA graphs"] = [*WITHOUT, "torch.compile", "CUDA graphs"]
    return named


def compare(work: Workload, rounds: int, with_compile: bool) -> tuple[float, list[dict[str, Any]]]:
    """u, and each configuration's seconds a step, the configurations in turn on each batch."""
    steps = {name: Steps(work, parts) for name, parts in configurations(with_compile).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    first: dict[str, float] = {}
    for name, one in steps.items():
        begin = time.perf_counter()
        for batch, tokens in work.batches[:2]:
            one.take(batch, tokens)
        first[name] = time.perf_counter() - begin
    units = [unit()]
    for turn in range(rounds):
        batch, tokens = work.batches[turn % len(work.batches)]
        for name, one in steps.items():
            begin = time.perf_counter()
            one.take(batch, tokens)
            times[name].append(time.perf_counter() - begin)
        if turn % 8 == 7:
            units.append(unit())
    u = min(units)
    return u, [
        {**row, "first_two_steps_seconds": first[row["configuration"]]} for row in _summaries(times, u)
    ]


def compare_passes(
    work: Workload, named: dict[str, list[str]], passes: int, device: str, recorder: Recorder | None = None
) -> tuple[float, list[dict[str, Any]]]:
    """u, and each configuration's seconds a step over passes over all batches, in turn; for a GPU.

    It is looked at after a pass and not after each step, for a training does not wait for its steps either.
    """
    steps: dict[str, Steps] = {}
    first, memory = {}, {}
    for name, parts in named.items():
        begin, before = time.perf_counter(), _allocated(device)
        steps[name] = Steps(work, parts, device, recorder)
        steps[name].warm_up()
        first[name] = time.perf_counter() - begin
        memory[name] = (_allocated(device, peak=True) - before) / 2**20
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(passes):
        for name, one in steps.items():
            wait(device)
            begin = time.perf_counter()
            for number in range(len(work.batches)):
                one.take_number(number)
            wait(device)
            times[name].append((time.perf_counter() - begin) / len(work.batches))
    u = unit(device)
    return u, [
        {
            **row,
            "warm_up_seconds": first[row["configuration"]],
            "peak_memory_mib": memory[row["configuration"]],
        }
        for row in _summaries(times, u)
    ]


def _allocated(device: str, peak: bool = False) -> int:
    """Bytes allocated on a GPU: now, from where peaks count anew, or at most since; 0 on a CPU."""
    if device == "cpu":
        return 0
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _summaries(times: dict[str, list[float]], u: float) -> list[dict[str, Any]]:
    plain, results = times["plain PyTorch"], []
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
        ratios = [a / b for a, b in zip(plain, seconds, strict=True)]
        results.append(
            {
                "configuration": name,
                "timing": timing,
                "mean_seconds": statistics.mean(seconds),
                "u": statistics.mean(seconds) / u,
                "u_median": timing.median / u,
                "speedup_median": statistics.median(ratios),
            }
        )
    return results


PARTS = {
    "matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm", "::addmv", "::linear", "mkldnn"),
    "graph operators": ("ecore_kernels::",),
    "attention": ("scaled_dot_product",),
    "random numbers": ("bernoulli", "random_", "native_dropout"),
    "optimiser": ("_adam_", "_foreach_"),
    "softmax, logarithms": ("softmax", "::exp", "::log", "::logsumexp", "::amax"),
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
"""What kernels belong to which part of a step, by pieces of their names; the first that fits."""


def where_time_goes(
    work: Workload, parts: Sequence[str], device: str = "cpu", steps: int = 8
) -> dict[str, float]:
    """Seconds a step in each of :data:`PARTS`, and the rest, by PyTorch's profiler (which adds some of its own).

    On a GPU they are the GPU's, in the kernels that an operation launches.
    """
    one = Steps(work, parts, device)
    for number in range(steps):
        one.take_number(number)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for number in range(steps):
            one.take_number(number)
        wait(device)
    seconds = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in profile.key_averages():
        if event.device_type != DeviceType.CPU:  # a kernel, whose time its operation has too
            continue
        spent = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        part = next((p for p, names in PARTS.items() if any(n in event.key for n in names)), "the rest")
        seconds[part] += spent / 1e6 / steps
    return seconds


def growth(work: Workload, device: str = "cpu", repeats: int = 3) -> list[dict[str, Any]]:
    """Seconds a step with all on, by batch size (real-length contexts) and by words of context."""
    one, results = Steps(work, list(WITHOUT), device), []
    sizes = [(rows, None) for rows in (1, 4, 16, 64, 256)] + [(4, words) for words in (32, 128, 512, 2048)]
    for rows, words in sizes:
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


def peak_memory(arguments: argparse.Namespace, configuration: str) -> float:
    """MiB that a process takes at most in 40 steps of a configuration, everything that it imports included."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.training",
        "--preset",
        arguments.preset,
        "--memory-of",
        configuration,
    ]
    if arguments.data:
        command += ["--data", str(arguments.data)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(told.strip().splitlines()[-1])


def _memory_of(work: Workload, configuration: str) -> float:
    one = Steps(work, configurations(True)[configuration])
    for turn in range(40):
        one.take(*work.batches[turn % len(work.batches)])
    # Not getrusage: that starts from the parent's peak.
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**10


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="a prepared folder (default: made-up batches of the same sizes)"
    )
    parser.add_argument("--preset", choices=("released", "paper"), default="released")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--rounds", type=int, help="steps of each configuration (default: 24); passes on a GPU (default: 7)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes of compilation)")
    parser.add_argument("--run-steps", type=int, metavar="N", help="then train PREPARED for N steps")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--plot", type=Path, help="draw them, as .svg or .png")
    parser.add_argument("--from", dest="kept", type=Path, help="draw kept results instead of measuring")
    parser.add_argument("--compile-only", action="store_true", help="fill torch.compile's cache alone")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.kept:
        kept = json.loads(arguments.kept.read_text())["results"][0]
        image = arguments.plot or arguments.kept.with_suffix(".svg")
        plot(kept["configurations"], kept["preset"], image, kept.get("device", "cpu"))
        return
    device = arguments.device
    if arguments.run_steps is not None and (arguments.data is None or arguments.run_steps < 2):
        parser.error("--run-steps: expected at least 2, and --data with a prepared folder")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    work = workload(arguments.data, arguments.preset)
    if arguments.memory_of:
        print(_memory_of(work, arguments.memory_of))
        return
    named = configurations(arguments.compile or arguments.compile_only, device)
    if arguments.compile_only:
        for name, parts in named.items():
            if "torch.compile" in parts and "CUDA graphs" not in parts:  # recording compiles nothing new
                Steps(work, parts, device).warm_up()
                print(f"compiled: {name}", flush=True)
        return

    if device == "cuda":
        u, results = compare_passes(work, named, arguments.rounds or 7, device)
    else:
        u, results = compare(work, arguments.rounds or 24, arguments.compile)
        for result in results:
            if result["configuration"] in ("plain PyTorch", "all", "all, bfloat16"):
                result["peak_memory_mib"] = peak_memory(arguments, result["configuration"])
    document = {
        "preset": arguments.preset,
        "device": device,
        "data": work.name,
        "u_seconds": u,
        "configurations": results,
        "parts": {
            name: where_time_goes(work, parts, device)
            for name, parts in (("plain", []), ("all", list(WITHOUT)))
        },
        "growth": growth(work, device),
    }
    if arguments.out:  # already now: a whole training takes longer than all before
        harness.write_json(arguments.out, "training", [document])
    if arguments.run_steps is not None:
        document["runs"] = whole_runs(arguments.data, arguments.preset, arguments.run_steps, device)
    print(report(document))
    if arguments.out:
        harness.write_json(arguments.out, "training", [document])
    if arguments.plot:
        plot(results, arguments.preset, arguments.plot, device)


if __name__ == "__main__":
    main()
