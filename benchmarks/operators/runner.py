"""Candidates checked and timed on one problem after another."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import harness
from benchmarks.operators import candidates, floors, problems
from benchmarks.operators.candidates import Candidate, UnsupportedError
from benchmarks.operators.problems import Problem

SECONDS_A_ROW = 6.0
MEASUREMENTS = (5, 25)
NO_TIME = "no time was left"
LOST_DEVICE = 75  # exit code: the same command with --resume goes on
# Beyond, launches hardly count, and a graph's own memory would.
LARGEST_REPLAYED = 1024


def reason(error: Exception) -> str:
    """Return in one line why a candidate did not run."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def compiler_cache_hits() -> int:
    """Count how often torch.compile has found a graph in its cache on disk."""
    counters = torch._dynamo.utils.counters
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def lost(device: str) -> bool:
    """Return whether an error has left this process without its GPU: every later call fails there."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class LostDeviceError(RuntimeError):
    """:func:`lost`, and the rows so far are written."""


class Runner:
    """Measures all candidates on one problem and direction, for each kind of masks in turn: compiled once for all."""

    def __init__(self, problem: Problem, direction: str, device: str, names: Sequence[str]) -> None:
        self.problem, self.direction, self.device = problem, direction, device
        self.backward = direction == "forward+backward"
        self.refused: dict[str, str] = {}
        self.compile_seconds: dict[str, tuple[float, bool]] = {}  # and whether a cache on disk helped
        self.launches: dict[str, int] = {}  # the same for all masks, and slow to count
        self.candidates: dict[str, Candidate] = {}
        problems.set_precision(problem.precision)
        torch._dynamo.reset()  # what is compiled counts towards a limit for each function
        for name in names:
            try:
                self.candidates[name] = candidates.build(name, problem, device, self.backward)
            except UnsupportedError as error:
                self.refused[name] = str(error)

    def row(self, masks: str) -> dict[str, Any]:
        """One result, as it goes into the JSON file."""
        problem = dataclasses.replace(self.problem, masks=masks)
        result: dict[str, Any] = {
            **dataclasses.asdict(problem),
            "direction": self.direction,
            "device": self.device,
            "candidates": {name: {"refused": why} for name, why in self.refused.items()},
            "ratios": {},
        }
        try:
            sets = problems.draw_sets(problem, self.device)
            first = sets[0]
            counted = floors.work(problem, first, self.backward)
            oracle = problems.oracle(problem, first, self.backward)
        except (RuntimeError, MemoryError) as error:
            result["refused"] = f"inputs or oracle: {reason(error)}"
            return result
        chosen = oracle.receivers
        result["judged"] = "all rows" if chosen is None else f"{len(chosen)} receivers of each head"
        calls: dict[str, Callable[[int], object]] = {}
        for name, candidate in self.candidates.items():
            entry: dict[str, Any] = {}
            result["candidates"][name] = entry
            try:
                entry |= self._check(name, candidate, oracle, first)
                if "refused" not in entry:
                    prepared = [candidate.prepare(tensors) for tensors in sets]
                    calls[name] = candidates.timed_call(candidate, prepared, self.backward)
                    entry |= self._look_at(name, calls[name], len(sets))
            except Exception as error:  # whatever a rival fails with, the others go on
                if lost(self.device):
                    raise RuntimeError(f"{name}: {reason(error)}") from error
                entry["refused"] = reason(error)
                calls.pop(name, None)
            free_memory(self.device)
        del oracle
        free_memory(self.device)
        self._time(calls, len(sets), result)
        self._compare(counted, result)
        return result

    def _check(
        self, name: str, candidate: Candidate, oracle: problems.Oracle, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """Run once and compare; the first run of a compiled candidate compiles."""
        start, hits = time.perf_counter(), compiler_cache_hits()
        answer = candidates.outputs_and_gradients(candidate, tensors, oracle.upstream, self.backward)
        if self.device == "cuda":
            torch.cuda.synchronize()
        if name in ("compiled", "flex"):
            seconds = time.perf_counter() - start
            self.compile_seconds.setdefault(name, (seconds, compiler_cache_hits() > hits))
        found = oracle.errors(*answer)
        norm, worst = (max(error[i] for error in found.values()) for i in (0, 1))
        entry: dict[str, Any] = {"error": norm, "worst_element": worst}
        if name in self.compile_seconds:
            entry["compile_seconds"], entry["compile_cached"] = self.compile_seconds[name]
        wrong = [
            f"{what} is off by {errors[0]:.1e} ({errors[1]:.1e} in one element)"
            for what, errors in found.items()
            if not self.problem.allows(errors)
        ]
        if wrong:
            entry["refused"] = f"wrong: {'; '.join(wrong[:3])}"
        return entry

    def _look_at(self, name: str, call: Callable[[int], object], sets: int) -> dict[str, Any]:
        for number in range(sets):
            call(number)
        entry: dict[str, Any] = {"peak_memory": harness.peak_memory(call, self.device)}
        if self.device == "cuda":
            if name not in self.launches:
                self.launches[name] = harness.launches(call)
            entry["launches"] = self.launches[name]
        return entry

    def _time(self, calls: dict[str, Callable[[int], object]], sets: int, result: dict[str, Any]) -> None:
        if not calls:
            return

        def timed(those: dict[str, Callable[[int], object]]) -> dict[str, harness.Timing]:
            rough = harness.interleaved(those, device=self.device, measurements=2, seconds_each=0.0)
            a_round = sum(max(0.002, timing.median) for timing in rough.values())
            fewest, most = MEASUREMENTS
            rounds = max(fewest, min(most, int(SECONDS_A_ROW / a_round)))
            return harness.interleaved(those, device=self.device, measurements=rounds)

        for name, timing in timed(calls).items():
            result["candidates"][name]["timing"] = timing
        if self.device != "cuda" or self.problem.nodes > LARGEST_REPLAYED:
            return
        replays: dict[str, Callable[[int], object]] = {}
        for name, call in calls.items():
            try:
                # All sets: a few would stay in a large cache from one replay to the next.
                replays[name] = harness.replayed(call, sets)
            except Exception as error:
                result["candidates"][name]["replay_refused"] = reason(error)
        if not replays:
            return
        for name, timing in timed(replays).items():
            per_call = {x: getattr(timing, x) / sets for x in ("minimum", "median", "p20", "p80")}
            result["candidates"][name]["replay"] = dataclasses.replace(timing, **per_call)

    def _compare(self, counted: floors.Work, result: dict[str, Any]) -> None:
        """Ratios to ours, and how near to the floor ours comes."""
        ceilings = floors.ceilings(self.device, self.problem.precision)
        seconds, bound = floors.floor(counted, ceilings)
        result["floor"] = {**counted._asdict(), **ceilings._asdict(), "seconds": seconds, "bound": bound}
        ours = result["candidates"].get("fused", {})
        for name, entry in result["candidates"].items():
            for kind in ("timing", "replay"):
                if kind in entry:
                    entry[f"{kind}_floor_reached"] = seconds / entry[kind].median
                    if name != "fused" and kind in ours:
                        ratios = result["ratios"].setdefault(name, {})
                        ratios[kind] = entry[kind].median / ours[kind].median
                        ratios[f"{kind}_minimum"] = entry[kind].minimum / ours[kind].minimum
            if name != "fused" and "timing" in entry and "timing" in ours:
                result["ratios"][name]["memory"] = entry["peak_memory"] / max(1, ours["peak_memory"])

    def compile(self) -> Iterator[tuple[str, float | str]]:
        """Only run the compiled candidates once, so that the compiler's cache on disk has them."""
        tensors = problems.draw(self.problem, 0, self.device)
        for name in ("compiled", "flex"):
            if name in self.candidates:
                start = time.perf_counter()
                try:
                    sent = problems.upstream(tensors)
                    candidates.outputs_and_gradients(self.candidates[name], tensors, sent, self.backward)
                except Exception as error:
                    yield name, reason(error)
                else:
                    yield name, time.perf_counter() - start


def run(
    wanted: Sequence[tuple[Problem, str]],
    device: str,
    *,
    masks: Sequence[str] = problems.MASKS,
    names: Sequence[str] = candidates.NAMES,
    budget: float | None = None,
    done: Callable[[list[dict[str, Any]]], None] = lambda results: None,
    before: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """A result for each problem, direction and kind of masks; ``done`` hears of all so far after each.

    Problems that a budget of seconds leaves no time for get a row that says so. ``before`` are results that need not
    be measured again.

    Raises:
        LostDeviceError: an error has taken the GPU away; ``done`` has heard of its row.
    """
    deadline = None if budget is None else time.monotonic() + budget
    results = [result for result in before if result.get("refused") != NO_TIME]
    finished = set(map(_identity, results))
    harness.keep_freed_memory()
    for problem, direction in wanted:
        call = problem, direction, device
        missing = [kind for kind in masks if _identity(_refused(*call, kind, "")) not in finished]
        if not missing:
            continue
        if deadline is not None and time.monotonic() > deadline:
            results.append(_refused(*call, " and ".join(missing), NO_TIME))
            continue
        runner = Runner(*call, names)
        for kind in missing:
            try:
                results.append(runner.row(kind))
            except Exception as error:
                results.append(_refused(*call, kind, reason(error)))
            done(results)
            if lost(device):
                raise LostDeviceError
            free_memory(device)
    done(results)
    return results


def _refused(problem: Problem, direction: str, device: str, masks: str, why: str) -> dict[str, Any]:
    """The row of what was not measured."""
    what = {**dataclasses.asdict(problem), "masks": masks, "direction": direction, "device": device}
    return {**what, "refused": why, "candidates": {}}


def _identity(result: dict[str, Any]) -> tuple[Any, ...]:
    """The measured parts of a row."""
    names = [field.name for field in dataclasses.fields(Problem)]
    return tuple(result[name] for name in (*names, "direction", "device"))
