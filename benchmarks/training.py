"""A whole training step: what it costs, what each improvement is worth, where its time goes, how it grows.

``python -m benchmarks.training [--data PREPARED] [--preset released] [--device cpu] [--out FILE.json]``

Times are of forward, backward and optimiser on batches of 16, in u (benchmarks/workload.py) and in seconds. The
improvements are taken out one by one by putting back what PyTorch offers in their place; configurations run in turn,
step by step, on the same batches. Peak memory is of a process of its own for each.

On a GPU (``--device cuda``) they run in turn pass by pass over the batches, which lie there; steps as CUDA graphs
gather theirs. Compilation and recording are before the clock starts, and told beside it. A configuration that fails,
or for which ``--seconds-budget`` leaves no time, is told as such; results are written after every part. One that fails
is a failure of the whole, by name, when all is written.
``benchmarks.whole_run`` times whole trainings.
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
from benchmarks.workload import Workload, made_up_batch, unit, wait, workload
from ecore.data.batches import Batch
from ecore.errors import InputError
from ecore.model import ecore as model_module
from ecore.model.dropout import Dropout
from ecore.model.encoder import Embedding
from ecore.precision import LowWeights, autocast, float32_products
from ecore.training.captured import CapturedStep, CudaGraphs, Recorder, Taken
from ecore.training.objective import objective
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

LOW = ("tf32", "bfloat16")
"""Precisions below float32."""

NO_TIME = "no time was left"
"""The reason given for a configuration that was not reached."""


class Steps:
    """Training steps of one configuration.

    Args:
        work: model and batches.
        parts: improvements that are on, of :data:`WITHOUT`, and "tf32", "bfloat16", "torch.compile" or "CUDA graphs".
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
            # A recorded step's learning rate is a tensor: the Adam of all tensors at once takes one where it may be
            # recorded, which is on a GPU alone.
            recorded, on_gpu = "CUDA graphs" in parts, next(self.model.parameters()).is_cuda
            self.optimizer = torch.optim.Adam(
                self.model.parameters(),
                betas=(0.9, 0.98),
                eps=1e-9,
                foreach=on_gpu or not recorded,
                capturable=on_gpu and recorded,
            )
        self.optimizer.param_groups[0]["lr"] = 1e-4
        self.precision = next((part for part in LOW if part in parts), "float32")
        # Plain PyTorch lets autocast cast weights one by one, and keep them.
        self.plain = not set(parts) & set(WITHOUT)
        self.low_weights = LowWeights(self.model, "float32" if self.plain else self.precision)
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

    @property
    def recorded(self) -> tuple[int, int]:
        """Shapes of batches that have a recording, and all that have come."""
        return (self._captured.recorded, self._captured.shapes) if self._captured else (0, 0)

    def warm_up(self) -> None:
        """Compile, record and have all that is made once, whatever batch comes."""
        for number in range((2 if self._captured is not None else 1) * len(self._batches)):
            self.take_number(number)
        wait(self.device)
        if (
            self._captured is not None and self._captured.failures
        ):  # steps that are not recorded are not to be timed so
            raise RuntimeError(self._captured.failures[0])

    def _step(self, batch: Batch, tokens: int) -> Taken:
        with contextlib.ExitStack() as stack:
            for take_out in self.off:
                stack.enter_context(take_out())
            stack.enter_context(float32_products(self.device, self.precision))
            stack.enter_context(self.low_weights())
            with autocast(self.device, self.precision, keep_casts=self.plain):
                losses = self.loss(batch, False, tokens)
            losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(losses.total.detach(), {})


def configurations(with_compile: bool, device: str = "cpu") -> dict[str, list[str]]:
    """Plain PyTorch, each improvement alone, all together, in lower precision; on a GPU also recorded.

    On a GPU what tells most comes first: time may end before the rest.
    """
    plain: dict[str, list[str]] = {"plain PyTorch": []}
    alone = {f"+ {part}": [part] for part in WITHOUT if part != "quick dropout masks" or device == "cpu"}
    if device == "cpu":
        named = plain | alone | {"all": list(WITHOUT), "all, bfloat16": [*WITHOUT, "bfloat16"]}
        return named | ({"all, torch.compile": [*WITHOUT, "torch.compile"]} if with_compile else {})

    def each(name: str, *parts: str) -> dict[str, list[str]]:
        """A configuration in each precision."""
        return {**{f"{name}, {kind}": [*parts, kind] for kind in LOW}, name: list(parts)}

    named = plain | each("all, CUDA graphs", *WITHOUT, "CUDA graphs") | each("all", *WITHOUT)
    named |= {f"plain, {kind}": [kind] for kind in LOW} | each("plain, CUDA graphs", "CUDA graphs") | alone
    if with_compile:
        named |= each("all, torch.compile", *WITHOUT, "torch.compile") | each(
            "plain, torch.compile", "torch.compile"
        )
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
    work: Workload,
    named: dict[str, list[str]],
    passes: int,
    device: str,
    recorder: Recorder | None = None,
    budget: float | None = None,
) -> tuple[float, list[dict[str, Any]]]:
    """u, and each configuration's seconds a step over passes over all batches, in turn; for a GPU.

    It is looked at after a pass and not after each step, for a training does not wait for its steps either.

    Args:
        budget: seconds; after half of them no further configuration is made ready, and after all no pass is begun.
    """
    began = time.perf_counter()

    def spent(share: float) -> bool:
        return budget is not None and time.perf_counter() - began > share * budget

    steps: dict[str, Steps] = {}
    first, memory, refused = {}, {}, {}
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
    u = unit(device)
    rows = _summaries(times, u)
    for row in rows:
        name = row["configuration"]
        row |= {"warm_up_seconds": first[name], "peak_memory_mib": memory[name]}
    return u, [*rows, *({"configuration": name, "refused": why} for name, why in refused.items())]


def _allocated(device: str, peak: bool = False) -> int:
    """Bytes allocated on a GPU: now, from where peaks count anew, or at most since; 0 on a CPU."""
    if device == "cpu":
        return 0
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _summaries(times: dict[str, list[float]], u: float) -> list[dict[str, Any]]:
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
                "u": statistics.mean(seconds) / u,
                "u_median": timing.median / u,
                "speedup_median": None if ratios is None else statistics.median(ratios),
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
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    parser.add_argument(
        "--seconds-budget", type=float, help="on a GPU: spend about so many seconds on the configurations"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--plot", type=Path, help="draw them, as .svg or .png")
    parser.add_argument("--from", dest="kept", type=Path, help="draw kept results instead of measuring")
    parser.add_argument("--compile-only", action="store_true", help="fill torch.compile's cache alone")
    parser.add_argument("--only", nargs="+", metavar="CONFIGURATION", help="measure or compile these alone")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.kept:
        try:
            kept = json.loads(arguments.kept.read_text())["results"][0]
        except (OSError, ValueError, KeyError, IndexError) as error:
            parser.error(f"--from: {arguments.kept}: expected results of this benchmark ({error})")
        image = arguments.plot or arguments.kept.with_suffix(".svg")
        plot(kept["configurations"], kept["preset"], image, kept.get("device", "cpu"))
        return
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    try:
        work = workload(arguments.data, arguments.preset)
    except InputError as error:
        parser.error(str(error))
    if arguments.memory_of:
        print(_memory_of(work, arguments.memory_of))
        return
    named = configurations(arguments.compile or arguments.compile_only, device)
    if arguments.only:
        unknown = [name for name in arguments.only if name not in named]
        if unknown:
            parser.error(f"--only: expected some of {'; '.join(named)}, got {unknown[0]!r}")
        named = {name: parts for name, parts in named.items() if name in arguments.only}
    if arguments.compile_only:
        for name, parts in named.items():
            if "torch.compile" in parts and "CUDA graphs" not in parts:  # recording compiles nothing new
                Steps(work, parts, device).warm_up()
                print(f"compiled: {name}", flush=True)
        return

    document: dict[str, Any] = {"preset": arguments.preset, "device": device, "data": work.name}

    def write() -> None:
        if arguments.out:
            harness.write_json(arguments.out, "training", [document])

    if device == "cuda":
        torch._dynamo.config.recompile_limit = 64  # all configurations share one code's compilations
        passes, budget = arguments.rounds or 7, arguments.seconds_budget
        compiling = {name: parts for name, parts in named.items() if "torch.compile" in parts}
        others = {name: parts for name, parts in named.items() if name not in compiling}
        share = None if budget is None else budget * (0.6 if compiling else 1.0)
        document["u_seconds"], results = compare_passes(work, others, passes, device, budget=share)
        document["configurations"] = results
        write()  # already now: compiling may take longer than there is time
        if compiling:
            again = {"plain PyTorch": others["plain PyTorch"], **compiling}
            share = None if budget is None else budget - share
            _, more = compare_passes(work, again, passes, device, budget=share)
            results += [row for row in more if row["configuration"] in compiling]
            write()
    else:
        document["u_seconds"], results = compare(work, arguments.rounds or 24, arguments.compile)
        document["configurations"] = results
        write()
        for result in results:
            if result["configuration"] in ("plain PyTorch", "all", "all, bfloat16"):
                # It may have asked for more than there is.
                with contextlib.suppress(subprocess.CalledProcessError):
                    result["peak_memory_mib"] = peak_memory(arguments, result["configuration"])
    document["growth"] = growth(work, device)
    write()
    parts = (("plain", []), ("all", list(WITHOUT)))
    document["parts"] = {name: where_time_goes(work, those, device) for name, those in parts}
    write()
    print(report(document))
    if arguments.plot:
        plot(results, arguments.preset, arguments.plot, device)
    failed = {
        row["configuration"]: row["refused"] for row in results if row.get("refused", NO_TIME) != NO_TIME
    }
    harness.fail_for(failed)


if __name__ == "__main__":
    main()
