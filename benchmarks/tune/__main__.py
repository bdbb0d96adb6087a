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
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from benchmarks.operators.problems import Problem
from benchmarks.tune.bench import Bench
from benchmarks.tune.pool import COMPILE_SECONDS, Pool
from benchmarks.tune.search import (
    DEPTHS,
    PRECISIONS,
    Configuration,
    Setting,
    first_round,
    grid_of,
    larger,
    ordered,
    search,
)
from benchmarks.tune.table import rewritten, text

SETTINGS_AT_ONCE = 12  # whose first rounds are compiled together


def parser() -> argparse.ArgumentParser:
    kernels = [f"{operator}_{way}" for operator in DEPTHS for way in ("forward", "backward")]
    parser = parser_of("benchmarks.tune", __doc__)
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--arithmetic", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="start nothing new after this, seconds"
    )
    parser.add_argument("--write", action="store_true", help="rewrite launch_table.json")
    parser.add_argument("--out", type=Path, help="write what was found as JSON, entry by entry")
    return parser


class Tuner:
    """Settings tuned one after another on this GPU, until a deadline (by ``time.monotonic()``)."""

    def __init__(self, pool: Pool, deadline: float) -> None:
        from ecore_kernels.triton_kernels import launch

        self.launch, self.pool, self.deadline = launch, pool, deadline
        self.architecture = launch.architecture(torch.device("cuda"))
        self.head = launch.padded(Problem("graph_attention", 1).dim)

    def in_time(self) -> bool:
        return time.monotonic() < self.deadline

    def start_of(self, setting: Setting) -> Configuration:
        """Return the table's own entry."""
        constants, options = self.launch.configuration(
            setting.kernel, setting.arithmetic, self.head, setting.depth, self.architecture
        )
        return {**constants, **options}

    def compile_first_rounds(self, settings: Sequence[Setting]) -> None:
        """Compile what the search measures first in each setting; in half of the time that is left at most."""
        jobs = [
            (setting, configuration)
            for setting in settings
            for configuration in first_round(setting, self.start_of(setting), self.architecture)
        ]
        left = self.deadline - time.monotonic()
        self.pool.compile(jobs, min(left / 2, COMPILE_SECONDS * SETTINGS_AT_ONCE))

    def tune(self, setting: Setting) -> dict[str, Any]:
        """Return the best configuration of a setting and its time, beside the table's own."""
        start = self.start_of(setting)
        bench = Bench(setting, self.pool)
        others = larger(setting, self.architecture)
        grid = grid_of(start, setting.arithmetic)
        best, seconds, before = search(start, grid, bench.measure, self.in_time, others)
        change = "as it was" if best == start else f"{harness.duration(before)} before: {start}"
        print(f"{setting}: {harness.duration(seconds)} with {best}, {change}", flush=True)
        return {
            **dataclasses.asdict(setting),
            "head": self.head,
            "architecture": self.architecture,
            "best": best,
            "before": start,
            "seconds": seconds if math.isfinite(seconds) else None,
            "seconds_before": before if math.isfinite(before) else None,
        }

    def tune_all(self, settings: Sequence[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
        """Yield what :meth:`tune` returns for one setting after another, while there is time."""
        for number, setting in enumerate(settings):
            if not self.in_time():
                print("the budget is used up: the other settings keep their entries")
                return
            if number % SETTINGS_AT_ONCE == 0:
                self.compile_first_rounds(settings[number : number + SETTINGS_AT_ONCE])
            yield setting, self.tune(setting)
            torch.cuda.empty_cache()

    def rewrite_table(self, setting: Setting, found: Configuration) -> None:
        """Put a configuration into the launch table's file."""
        launch = self.launch
        rows = json.loads(launch.TABLE.read_text())
        launch.TABLE.write_text(text(rewritten(rows, setting, self.head, self.architecture, found)))
        launch.table.cache_clear()
        launch.configuration.cache_clear()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if not torch.cuda.is_available():
        parser().exit(2, "tune: there is no CUDA device\n")
    settings = ordered(
        Setting(kernel, arithmetic, depth)
        for kernel in arguments.kernels
        for arithmetic in arguments.arithmetic
        for depth in DEPTHS[kernel.rpartition("_")[0]]
    )
    deadline = time.monotonic() + arguments.budget
    pool = Pool(max(1, min(12, len(os.sched_getaffinity(0)) - 2)), deadline)
    try:
        tuner = Tuner(pool, deadline)
        found: list[dict[str, Any]] = []
        for setting, result in tuner.tune_all(settings):
            found.append(result)
            if arguments.out:
                harness.write_json(arguments.out, "tune", found)
            if arguments.write and result["best"] != result["before"]:
                tuner.rewrite_table(setting, result["best"])
    finally:
        pool.close()


if __name__ == "__main__":
    main()
