"""The search: settings in order, configurations to try, and the way from one to the next."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.operators import problems
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """Key of an entry in the launch table."""

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
