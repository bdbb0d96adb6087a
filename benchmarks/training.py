"""A whole training step: what it costs, what each improvement is worth, where its time goes, how it grows.

``python -m benchmarks.training [--data PREPARED] [--preset released] [--out FILE.json] [--plot FILE.svg]``

Times are of forward, backward and optimiser on batches of 16, in u (benchmarks/workload.py) and in seconds. The
improvements are taken out one by one by putting back what PyTorch offers in their place; configurations run in turn,
step by step, on the same batches. Peak memory is of a process of its own for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.workload import Workload, made_up_batch, unit, workload
from ecore.data.batches import Batch
from ecore.model import ECore
from ecore.model import ecore as model_module
from ecore.model.dropout import Dropout
from ecore.model.encoder import Embedding
from ecore.training.schedule import adam
from ecore_kernels import use_backend

RELEASED_CODE = {"released": (20.0, 37.0)}
"""u a step that the authors' released code takes on two CPU cores, batch 16: measured once, not by this script."""


def _plain_losses(
    states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, label_smoothing: float, scale: float
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
        parts: improvements that are on, of :data:`WITHOUT`, and "bfloat16" or "torch.compile".
        **settings: of the model.
    """

    def __init__(self, work: Workload, parts: Sequence[str], **settings: Any) -> None:
        self.off = [take_out for name, take_out in WITHOUT.items() if name not in parts]
        self.model: ECore = work.model(**settings)
        if "fused optimiser" in parts:
            self.optimizer = adam(self.model.parameters())
        else:
            self.optimizer = torch.optim.Adam(
                self.model.parameters(), betas=(0.9, 0.98), eps=1e-9, foreach=True
            )
        self.optimizer.param_groups[0]["lr"] = 1e-4
        self.dtype = torch.bfloat16 if "bfloat16" in parts else None
        self.loss: Any = (
            torch.compile(self.model.loss, dynamic=True) if "torch.compile" in parts else self.model.loss
        )

    def take(self, batch: Batch, tokens: int) -> Tensor:
        """One step; the loss, detached."""
        with contextlib.ExitStack() as stack:
            for take_out in self.off:
                stack.enter_context(take_out())
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
                losses = self.loss(batch, tokens=tokens)
            losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses.total.detach()


def configurations(with_compile: bool) -> dict[str, list[str]]:
    """Plain PyTorch, each improvement alone, all together, all in bfloat16."""
    named: dict[str, list[str]] = {"plain PyTorch": [], **{f"+ {part}": [part] for part in WITHOUT}}
    named["all"] = list(WITHOUT)
    named["all, bfloat16"] = [*WITHOUT, "bfloat16"]
    if with_compile:
        named["all, torch.compile"] = [*WITHOUT, "torch.compile"]
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
    u, plain = min(units), times["plain PyTorch"]
    results = []
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
                "first_two_steps_seconds": first[name],
            }
        )
    return u, results


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


def where_time_goes(work: Workload, parts: Sequence[str], steps: int = 8) -> dict[str, float]:
    """Seconds a step in each of :data:`PARTS`, and the rest, by PyTorch's profiler (which adds some of its own)."""
    one = Steps(work, parts)
    for batch, tokens in work.batches[:2]:
        one.take(batch, tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for batch, tokens in work.batches[:steps]:
            one.take(batch, tokens)
    seconds = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in profile.key_averages():
        part = next((p for p, names in PARTS.items() if any(n in event.key for n in names)), "the rest")
        seconds[part] += event.self_cpu_time_total / 1e6 / steps
    return seconds


def growth(work: Workload, repeats: int = 3) -> list[dict[str, Any]]:
    """Seconds a step with all on, by batch size (real-length contexts) and by words of context."""
    one, results = Steps(work, list(WITHOUT)), []
    sizes = [(rows, None) for rows in (1, 4, 16, 64, 256)] + [(4, words) for words in (32, 128, 512, 2048)]
    for rows, words in sizes:
        times = []
        for turn in range(repeats + 1):
            batch, tokens = made_up_batch(rows, turn, words, len(one.model.vocabulary))
            begin = time.perf_counter()
            one.take(batch, tokens)
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


def plot(results: list[dict[str, Any]], preset: str, path: Path) -> None:
    """Bars of u a step, one a configuration: medians, which a shared machine's slow moments do not move."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.45 * len(results) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    rows = list(reversed(results))
    bars = axes.barh(
        [r["configuration"] for r in rows], [r["u_median"] for r in rows], color="#35618f", height=0.65
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    if preset in RELEASED_CODE:
        low, high = RELEASED_CODE[preset]
        axes.axvspan(low, high, color="#c98b2b", alpha=0.35, hatch="//", label="the authors' released code")
        figure.legend(loc="outside upper right", frameon=False)
    axes.set_xlabel("u a training step, median")
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "ecore"}):  # the same results make the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _report(results: list[dict[str, Any]]) -> Iterator[list[str]]:
    for result in results:
        timing = result["timing"]
        yield [
            result["configuration"],
            f"{result['u']:.2f}",
            harness.duration(timing.median),
            f"{harness.duration(timing.p20)} – {harness.duration(timing.p80)}",
            f"{result['speedup_median']:.2f}",
            f"{result['peak_memory_mib']:,.0f} MiB" if "peak_memory_mib" in result else "",
        ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="a prepared folder (default: made-up batches of the same sizes)"
    )
    parser.add_argument("--preset", choices=("released", "paper"), default="released")
    parser.add_argument("--rounds", type=int, default=24, help="steps of each configuration")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes of compilation)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--plot", type=Path, help="draw them, as .svg or .png")
    parser.add_argument("--from", dest="kept", type=Path, help="draw kept results instead of measuring")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.kept:
        kept = json.loads(arguments.kept.read_text())["results"][0]
        plot(kept["configurations"], kept["preset"], arguments.plot or arguments.kept.with_suffix(".svg"))
        return
    work = workload(arguments.data, arguments.preset)
    if arguments.memory_of:
        print(_memory_of(work, arguments.memory_of))
        return

    u, results = compare(work, arguments.rounds, arguments.compile)
    for result in results:
        if result["configuration"] in ("plain PyTorch", "all", "all, bfloat16"):
            result["peak_memory_mib"] = peak_memory(arguments, result["configuration"])
    print(f"{arguments.preset}, batches of 16, {work.name}; u = {harness.duration(u)}\n")
    header = ["configuration", "u (mean)", "median", "p20 – p80", "plain / this", "memory"]
    print(harness.table(header, list(_report(results))))

    parts = {name: where_time_goes(work, named) for name, named in (("plain", []), ("all", list(WITHOUT)))}
    rows = [[p, *(harness.duration(parts[n][p]) for n in parts)] for p in parts["plain"]]
    rows.append(["sum", *(harness.duration(sum(parts[n].values())) for n in parts)])
    print("\nwhere a step's time goes (under the profiler)\n")
    print(harness.table(["part", "plain PyTorch", "all"], rows))

    grown = growth(work)
    print("\nhow it grows (all on)\n")
    rows = [
        [
            str(g["batch"]),
            str(g["context_words"] or "as in the data"),
            harness.duration(g["seconds_a_sample"]),
        ]
        for g in grown
    ]
    print(harness.table(["batch", "context words", "a sample"], rows))
    if arguments.out:
        document = {"preset": arguments.preset, "data": work.name, "u_seconds": u, "configurations": results}
        harness.write_json(arguments.out, "training", [{**document, "parts": parts, "growth": grown}])
    if arguments.plot:
        plot(results, arguments.preset, arguments.plot)


if __name__ == "__main__":
    main()
