"""Seconds of one setting's configurations: compiled, checked, timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.operators import candidates, problems
from benchmarks.operators.problems import Problem
from benchmarks.tune.pool import Pool, key
from benchmarks.tune.search import PRECISIONS, Configuration, Setting
from benchmarks.tune.trial import using

FAR_BEHIND = 1.15  # of the best time on the first input: who takes longer is not timed on the others


class Bench:
    """Compiles, checks and times one setting's configurations."""

    def __init__(self, setting: Setting, pool: Pool) -> None:
        self.setting = setting
        self.pool = pool
        self.inputs: list[tuple[Problem, list[dict[str, Any]], problems.Oracle]] = []
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
            key(self.setting, c): self._seconds(c, self.inputs)
            for c, alone in zip(usable, first, strict=True)
            if alone <= longest and alone < math.inf
        }
        return [seconds.get(key(self.setting, c), math.inf) for c in configurations]

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
                    timing = harness.interleaved({"it": replay}, device="cuda", measurements=11)["it"]
                    logarithms.append(math.log(timing.median / len(sets)))
        except Exception as error:  # a candidate that fails is no candidate
            print(f"  passed over: {configuration}: {type(error).__name__}: {str(error)[:100]}")
            return math.inf
        return math.exp(statistics.mean(logarithms))
