"""Choose the Triton kernels' launch configurations by measuring them on this GPU; rewrite the launch table.

    python -m benchmarks.tune [--kernels graph_attention_forward ...] [--arithmetic half tf32 ieee]
        [--budget SECONDS] [--write] [--out FILE.json]

For every kernel, arithmetic and depth of history, at the paper's size (d 100, B 16, K 3, P 32, N 160 and 288,
all words taking part and real masks): starting from the table's own entry, all configurations that differ from
the best so far in one place of GRID are compiled (in parallel), checked against the float64 oracle and timed as
replayed CUDA graphs; the search moves on to the best, until none is better by more than 2 per cent. On sm_90 and
newer the first round has the larger configurations of HOPPER besides. A forward kernel is timed by the forward
pass, a backward kernel by forward and backward, the geometric mean over the four inputs deciding; who is far
behind on the first input is not timed on the others. What does not compile, does not fit the GPU or gives a wrong
result is passed over.

The model's own calls come first: tf32 and bfloat16, graph_attention with one layer of history and with none,
edge_readout with two. The first rounds of a dozen settings are compiled together before the first of them is timed;
of a ``--budget`` at most half of what is left goes into that.

``--write`` puts what was found into kernels/ecore_kernels/triton_kernels/launch_table.json as entries of this
architecture; other architectures' entries stay as they are (one that has none of its own follows the nearest
older one's). Without it, what would change is only printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.operators import candidates, problems
from benchmarks.operators.problems import Problem

Configuration = dict[str, Any]  # constants and options by name

# What a configuration may be made of: a kernel's constants (those that its table entries have), then options.
GRID: dict[str, tuple[Any, ...]] = {
    "BLOCK": (16, 32, 64, 128),
    "STEP": (16, 32, 64),
    "SHARED_STEP": (16, 32, 64),
    "COLUMNS": (16, 32),
    "PIECE": (16, 32, 64, 128),
    "RELOAD": (False, True),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3),
}
# Larger tiles than sm_80's entries have, several places away from them: by kernel and arithmetic, what compiles for
# sm_90 at d = 100 and the model's depth without spills. An SM has no more registers than an sm_80's: with one layer of
# history, 64 rows backward in tf32 spill, and forward 64 rows by 64 senders.
HOPPER: dict[tuple[str, str], tuple[Configuration, ...]] = {
    ("graph_attention_forward", "tf32"): tuple(
        {"BLOCK": 64, "STEP": 32, "PIECE": 128, "num_warps": 8, "num_stages": stages} for stages in (1, 2)
    ),
    ("graph_attention_forward", "half"): (
        {"BLOCK": 64, "STEP": 32, "PIECE": 128, "num_warps": 8, "num_stages": 2},
    ),
    ("graph_attention_backward", "half"): (
        {"BLOCK": 64, "STEP": 32, "PIECE": 128, "RELOAD": True, "num_warps": 8, "num_stages": 2},
    ),
    ("edge_attention_forward", "half"): ({"BLOCK": 64, "STEP": 32, "num_warps": 8, "num_stages": 2},),
    ("edge_readout_forward", "half"): ({"BLOCK": 64, "COLUMNS": 32, "num_warps": 8, "num_stages": 3},),
}
HOPPER_ARCHITECTURE = 90
# Emulated in full float32, larger tiles take the compiler minutes.
IEEE_LARGEST = 32
OPTIONS = ("num_warps", "num_stages")
PRECISIONS = {
    "tf32": "tf32",
    "half": "bfloat16",
    "ieee": "ieee",
}  # the table's arithmetic: the benchmarks' precision
DEPTHS = {"graph_attention": (1, 0, 2, 3), "edge_readout": (2, 1, 3), "edge_attention": (0,)}
THE_MODELS = {("graph_attention", 1), ("graph_attention", 0), ("edge_readout", 2)}
NODES = (160, 288)
WORTHWHILE = 0.98  # of the best time so far: what a new best has to stay under
FAR_BEHIND = 1.15  # of the best time on the first input: who takes longer is not timed on the others
COMPILE_SECONDS = 60.0  # for the configurations of one round
SETTINGS_AT_ONCE = 12  # whose first rounds are compiled together


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one entry of the table is for."""

    kernel: str
    arithmetic: str
    depth: int

    @property
    def operator(self) -> str:
        return self.kernel.rpartition("_")[0]

    @property
    def backward(self) -> bool:
        return self.kernel.endswith("_backward")

    def workloads(self) -> list[Problem]:
        """The problems that decide."""
        # The dense operator is looked up at depth 0; its call updates the edges, as a layer of a model does.
        depth = 1 if self.operator == "edge_attention" else self.depth
        return [
            Problem(self.operator, nodes, depth=depth, masks=masks, precision=PRECISIONS[self.arithmetic])
            for nodes, masks in itertools.product(NODES, problems.MASKS)
        ]


# The search ---------------------------------------------------------------------------------------------------


def grid_of(start: Configuration, arithmetic: str) -> dict[str, tuple[Any, ...]]:
    """The part of GRID that a kernel has, by its present configuration."""
    grid = {}
    for name, values in GRID.items():
        if name in start:
            small = [v for v in values if name in (*OPTIONS, "PIECE") or v <= IEEE_LARGEST]
            grid[name] = tuple(small) if arithmetic == "ieee" else values
    return grid


def variants(configuration: Configuration, grid: Mapping[str, Sequence[Any]]) -> list[Configuration]:
    """All configurations that differ from this one in one place."""
    return [
        configuration | {name: value}
        for name, values in grid.items()
        for value in values
        if value != configuration[name]
    ]


def search(
    start: Configuration,
    grid: Mapping[str, Sequence[Any]],
    measure: Callable[[list[Configuration]], list[float]],
    in_time: Callable[[], bool] = lambda: True,
    others: Sequence[Configuration] = (),
) -> tuple[Configuration, float, float]:
    """Move from ``start`` to the best variant, and on, while that pays.

    Args:
        measure: seconds of each of several configurations; infinite for those that are not worth using.
        in_time: asked before each round.
        others: configurations that are measured in the first round besides the variants.

    Returns:
        the best configuration, its seconds, and the seconds of ``start``.
    """
    (first,) = measure([start])
    best, seconds = start, first
    seen = [start]
    while in_time():
        fresh = []
        for configuration in (*others, *variants(best, grid)):
            if configuration not in seen:
                fresh.append(configuration)
                seen.append(configuration)
        if not fresh:
            break
        timings = measure(fresh)
        least = min(range(len(fresh)), key=timings.__getitem__)
        if not timings[least] < WORTHWHILE * seconds:
            break
        best, seconds = fresh[least], timings[least]
    return best, seconds, first


def larger(setting: Setting, architecture: int) -> tuple[Configuration, ...]:
    """The configurations of HOPPER for a setting, where the architecture may take them."""
    if architecture < HOPPER_ARCHITECTURE:
        return ()
    return HOPPER.get((setting.kernel, setting.arithmetic), ())


def first_round(setting: Setting, start: Configuration, architecture: int) -> list[Configuration]:
    """Return the configurations that the search measures before it moves, the likeliest first."""
    return [start, *larger(setting, architecture), *variants(start, grid_of(start, setting.arithmetic))]


def ordered(settings: Iterable[Setting]) -> list[Setting]:
    """Settings by what they tell: the fast types, then the model's own calls, each operator's commonest depth first."""

    def rank(setting: Setting) -> tuple[Any, ...]:
        own = (setting.operator, setting.depth) in THE_MODELS
        return setting.arithmetic == "ieee", not own, DEPTHS[setting.operator].index(setting.depth)

    return sorted(settings, key=rank)


# The table ----------------------------------------------------------------------------------------------------


def rewritten(
    rows: Sequence[Mapping[str, Any]], setting: Setting, head: int, architecture: int, found: Configuration
) -> list[dict[str, Any]]:
    """The table's rows with an entry for this setting, head and architecture, in the table's order.

    A lookup takes the nearest depth before the nearest architecture, so a depth that is new to the table would
    change what other architectures get: they are given the entries that they resolved to so far.
    """
    family = {"kernel": setting.kernel, "arithmetic": setting.arithmetic, "head": head}

    def belongs(row: Mapping[str, Any], **more: Any) -> bool:
        return all(row[name] == value for name, value in (family | more).items())

    depths = [row["depth"] for row in rows if belongs(row)]
    copies = []
    if depths and setting.depth not in depths:
        nearest = max((d for d in depths if d <= setting.depth), default=min(depths))
        copies = [dict(row) | {"depth": setting.depth} for row in rows if belongs(row, depth=nearest)]
    entry = {
        **family,
        "depth": setting.depth,
        "architecture": architecture,
        "constants": {name: value for name, value in found.items() if name not in OPTIONS},
        **{name: found[name] for name in OPTIONS},
    }
    kept = [dict(row) for row in (*rows, *copies)]
    kept = [r for r in kept if not belongs(r, depth=setting.depth, architecture=architecture)]
    kernels = list(dict.fromkeys(row["kernel"] for row in (*rows, entry)))
    kinds = list(dict.fromkeys(row["arithmetic"] for row in (*rows, entry)))

    def place(row: Mapping[str, Any]) -> tuple[int, ...]:
        where = kernels.index(row["kernel"]), kinds.index(row["arithmetic"])
        return (*where, row["head"], row["depth"], row["architecture"])

    return sorted([*kept, entry], key=place)


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as its file has it: one line an entry."""
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n"


# Measuring ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def using(kernel: str, configuration: Configuration) -> Iterator[None]:
    """Inside, that kernel is launched with this configuration; others as the table says."""
    from ecore_kernels.triton_kernels import launch

    from_table = launch.configuration

    def chosen(name: str, *key: Any) -> tuple[dict[str, Any], dict[str, int]]:
        if name != kernel:
            return from_table(name, *key)
        constants = {n: value for n, value in configuration.items() if n not in OPTIONS}
        return constants, {n: configuration[n] for n in OPTIONS}

    launch.configuration = chosen
    try:
        yield
    finally:
        launch.configuration = from_table


@functools.cache
def _first_inputs(problem: Problem) -> dict[str, Any]:
    return problems.draw(problem, 0, "cuda")


def try_once(setting: Setting, configuration: Configuration) -> str:
    """Compile a configuration, in a process of its own, by running it: the compiler's cache on disk then has it.

    Returns:
        why it failed, or "".
    """
    try:
        with using(setting.kernel, configuration):
            problem = setting.workloads()[0]
            problems.set_precision(problem.precision)
            tensors = _first_inputs(problem)
            candidate = candidates.build("fused", problem, "cuda", setting.backward)
            sent = problems.upstream(tensors)
            candidates.outputs_and_gradients(candidate, tensors, sent, setting.backward)
            torch.cuda.synchronize()
    except Exception as error:  # out of resources, or whatever else the compiler says
        return f"{type(error).__name__}: {error}"[:200]
    return ""


class Bench:
    """Compiles, checks and times one setting's configurations."""

    def __init__(self, setting: Setting, pool: Pool) -> None:
        self.setting = setting
        self.pool = pool
        self.inputs = []
        problems.set_precision(PRECISIONS[setting.arithmetic])
        for problem in setting.workloads():
            sets = problems.draw_sets(problem, "cuda")
            self.inputs.append((problem, sets, problems.oracle(problem, sets[0], setting.backward)))

    def measure(self, configurations: list[Configuration]) -> list[float]:
        """Seconds: the geometric mean over the workloads; infinite for what fails, is wrong or is far behind."""
        refused = self.pool.compile([(self.setting, c) for c in configurations])
        usable = [c for c, why in zip(configurations, refused, strict=True) if not why]
        first = [self._seconds(c, self.inputs[:1]) for c in usable]
        longest = FAR_BEHIND * min(first, default=math.inf)
        seconds = {
            _key(self.setting, c): self._seconds(c, self.inputs)
            for c, alone in zip(usable, first, strict=True)
            if alone <= longest and alone < math.inf
        }
        return [seconds.get(_key(self.setting, c), math.inf) for c in configurations]

    def _seconds(self, configuration: Configuration, inputs: Sequence[Any]) -> float:
        """Geometric mean over some workloads; infinite if one fails or comes out wrong."""
        backward = self.setting.backward
        logarithms = []
        try:
            with using(self.setting.kernel, configuration):
                for problem, sets, oracle in inputs:
                    candidate = candidates.build("fused", problem, "cuda", backward)
                    answer = candidates.outputs_and_gradients(candidate, sets[0], oracle.upstream, backward)
                    if not all(map(problem.allows, oracle.errors(*answer).values())):
                        return math.inf
                    call = candidates.timed_call(candidate, sets, backward)
                    replay = harness.replayed(call, len(sets))
                    timing = harness.interleaved(
                        {"it": lambda _, replay=replay: replay()}, device="cuda", measurements=11
                    )["it"]
                    logarithms.append(math.log(timing.median / len(sets)))
        except Exception as error:  # a candidate that fails is no candidate
            print(f"  passed over: {configuration}: {type(error).__name__}: {str(error)[:100]}")
            return math.inf
        return math.exp(statistics.mean(logarithms))


def _lost(why: str | None) -> bool:
    """Whether a process that failed for this reason can do nothing more on the GPU: PyTorch's words and Triton's."""
    return why is not None and ("CUDA error" in why or "[CUDA]" in why)


Job = tuple[Setting, Configuration]


def _key(setting: Setting, configuration: Configuration) -> tuple[Setting, str]:
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
        fresh = [job for job in jobs if _key(*job) not in self._known]
        refused = self._try(fresh, seconds)
        for index, why in enumerate(refused):
            # Who came after it in the same process was struck as well, and has another go.
            if _lost(why):
                self._replace()
                (refused[index],) = self._try([fresh[index]], seconds)
        if any(map(_lost, refused)):
            self._replace()
        answers = {_key(*job): why for job, why in zip(fresh, refused, strict=True)}
        self._known |= {key: why for key, why in answers.items() if why is not None}
        late = f"took more than {seconds:.0f} s"
        return [late if (why := (self._known | answers)[_key(*job)]) is None else why for job in jobs]

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


def main(argv: Sequence[str] | None = None) -> None:
    kernels = [f"{operator}_{way}" for operator in DEPTHS for way in ("forward", "backward")]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--arithmetic", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="start nothing new after this, seconds"
    )
    parser.add_argument("--write", action="store_true", help="rewrite launch_table.json")
    parser.add_argument("--out", type=Path, help="write what was found as JSON, entry by entry")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(2, "tune: there is no CUDA device\n")
    from ecore_kernels.triton_kernels import launch

    deadline = time.monotonic() + arguments.budget
    architecture = launch.architecture(torch.device("cuda"))
    head = launch.padded(Problem("graph_attention", NODES[0]).dim)
    settings = ordered(
        Setting(kernel, arithmetic, depth)
        for kernel in arguments.kernels
        for arithmetic in arguments.arithmetic
        for depth in DEPTHS[kernel.rpartition("_")[0]]
    )

    def start_of(setting: Setting) -> Configuration:
        constants, options = launch.configuration(
            setting.kernel, setting.arithmetic, head, setting.depth, architecture
        )
        return {**constants, **options}

    found: list[dict[str, Any]] = []
    pool = Pool(max(1, min(12, len(os.sched_getaffinity(0)) - 2)), deadline)
    try:
        for number, setting in enumerate(settings):
            if time.monotonic() > deadline:
                print("the budget is used up: the other settings keep their entries")
                break
            if number % SETTINGS_AT_ONCE == 0:
                jobs = [
                    (s, configuration)
                    for s in settings[number : number + SETTINGS_AT_ONCE]
                    for configuration in first_round(s, start_of(s), architecture)
                ]
                left = deadline - time.monotonic()
                pool.compile(jobs, min(left / 2, COMPILE_SECONDS * SETTINGS_AT_ONCE))
            start = start_of(setting)
            bench = Bench(setting, pool)
            best, seconds, before = search(
                start,
                grid_of(start, setting.arithmetic),
                bench.measure,
                lambda: time.monotonic() < deadline,
                larger(setting, architecture),
            )
            change = "as it was" if best == start else f"{harness.duration(before)} before: {start}"
            print(f"{setting}: {harness.duration(seconds)} with {best}, {change}", flush=True)
            found.append(
                {
                    **dataclasses.asdict(setting),
                    "head": head,
                    "architecture": architecture,
                    "best": best,
                    "before": start,
                    "seconds": seconds if math.isfinite(seconds) else None,
                    "seconds_before": before if math.isfinite(before) else None,
                }
            )
            if arguments.out:
                harness.write_json(arguments.out, "tune", found)
            if best != start and arguments.write:
                rows = json.loads(launch.TABLE.read_text())
                launch.TABLE.write_text(text(rewritten(rows, setting, head, architecture, best)))
                launch.table.cache_clear()
                launch.configuration.cache_clear()
            del bench
            torch.cuda.empty_cache()
    finally:
        pool.close()


if __name__ == "__main__":
    main()
