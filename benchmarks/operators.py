"""The graph operators against plain PyTorch, torch.compile, FlexAttention and the physical floor.

    python -m benchmarks.operators [--device cpu|cuda] [--operators graph_attention edge_readout edge_attention]
        [--nodes 160 288 ...] [--depths 1 ...] [--precision tf32 bfloat16 ieee] [--masks all real]
        [--seconds-budget S] [--out FILE.json]

B 16 (1 from N = 2048 on), K 3, P 32, d 100. ``benchmarks/problems.py`` says how inputs are drawn (all words
taking part, and masks as real data has them), ``benchmarks/candidates.py`` what each candidate does and why
that is the same work, ``benchmarks/floors.py`` what the floor counts. graph_attention has one layer of history
unless ``--depths`` says otherwise, edge_readout two; edge_attention is measured with (depth 1) and without (0)
the edges' update.

A candidate is timed only after its outputs, and where they are timed its gradients, passed the float64 oracle
in this very run on the very inputs; otherwise its place says why. Times are medians of interleaved measurements
over rotating sets of inputs, Python and launches included; on CUDA the same calls are replayed from a CUDA
graph too, which leaves those out. Ratios are a rival's time over ours, of medians and of minima: where the
medians' is below 1 we lose, and the row says so. Results are written after every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import candidates, floors, harness, problems
from benchmarks.candidates import Candidate, UnsupportedError
from benchmarks.problems import Problem

# In the order in which a budget of time is spent on them.
NODES = {"cuda": (160, 288, 96, 4096, 16384, 64, 1024, 2048), "cpu": (96, 160, 288, 64, 1024)}
PRECISIONS = {"cuda": ("tf32", "bfloat16", "ieee"), "cpu": ("ieee",)}
DEPTHS = {"graph_attention": (1,), "edge_readout": (2,), "edge_attention": (1, 0)}
BATCH, SINGLE_FROM = 16, 2048

SECONDS_A_ROW = 6.0
MEASUREMENTS = (5, 25)
NO_TIME = "no time was left"
LOST_DEVICE = 75  # exit code: the same command with --resume goes on
# Beyond, launches hardly count, and a graph's own memory would.
LARGEST_REPLAYED = 1024


def plan(
    device: str,
    operators: Sequence[str],
    nodes: Sequence[int] | None,
    precisions: Sequence[str] | None,
    depths: Sequence[int] | None,
) -> list[tuple[Problem, str]]:
    """Problems (masks aside) and directions, the most telling first, for a budget may end before the rest.

    First comes graph_attention, forward and backward, at the sizes that dialogues have; then larger and smaller
    sizes, the other operators and the forward pass alone take turns; all of ieee comes last.
    """
    found = []
    sizes, kinds = nodes or NODES[device], precisions or PRECISIONS[device]
    for operator in operators:
        wanted = DEPTHS[operator]
        if depths is not None and operator != "edge_attention":
            wanted = tuple(d for d in depths if d or operator != "edge_readout") or wanted
        for size, kind, depth in itertools.product(sizes, kinds, wanted):
            batch = 1 if size >= SINGLE_FROM else BATCH
            problem = Problem(operator, size, batch=batch, depth=depth, precision=kind)
            for direction in problems.DIRECTIONS:
                forward = direction == "forward"
                turn = sizes.index(size) + 2 * operators.index(operator) + 2 * forward
                rank = (kind == "ieee", turn, operators.index(operator), forward, kinds.index(kind))
                found.append((rank, problem, direction))
    return [(problem, direction) for _, problem, direction in sorted(found, key=lambda entry: entry[0])]


def reason(error: Exception) -> str:
    """Why a candidate did not run, in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def compiler_cache_hits() -> int:
    """How often torch.compile has found a graph in its cache on disk."""
    counters = torch._dynamo.utils.counters
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def lost(device: str) -> bool:
    """Whether an error has left this process without its GPU: nothing runs there any more, whoever calls."""
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
            entry = result["candidates"][name] = {}
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
        for name, timing in timed({n: lambda _, r=r: r() for n, r in replays.items()}).items():
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
    """What was measured in a row."""
    names = [field.name for field in dataclasses.fields(Problem)]
    return tuple(result[name] for name in (*names, "direction", "device"))


def load(path: Path) -> list[dict[str, Any]]:
    """The results in a JSON file, as :func:`run` gave them."""
    results = json.loads(path.read_text())["results"]
    for entry in (entry for result in results for entry in result["candidates"].values()):
        entry |= {kind: harness.Timing(**entry[kind]) for kind in ("timing", "replay") if kind in entry}
    return results


def report(results: Sequence[dict[str, Any]]) -> str:
    """A table an operator, losses marked, and below each why candidates are missing."""
    parts = []
    for operator in dict.fromkeys(result["operator"] for result in results):
        mine = [result for result in results if result["operator"] == operator]
        measured = [result for result in mine if any("timing" in c for c in result["candidates"].values())]
        parts.append(f"## {operator}\n")
        if measured:
            parts.append(harness.table(HEADER, [show(result) for result in measured]) + "\n")
        notes: dict[str, list[str]] = {}
        for result in mine:
            shape = f"{result['nodes']} {result['masks']} {result['precision']}"
            at = f"{shape} {result['direction']} depth {result['depth']}"
            whys = {n: c["refused"] for n, c in result["candidates"].items() if "refused" in c}
            if "refused" in result:
                whys["not measured"] = result["refused"]
            for name, why in whys.items():
                notes.setdefault(f"{name}: {why}", []).append(at)
        for note, places in notes.items():
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            parts.append(f"- {note} [{'; '.join(places[:3])}{more}]")
        parts.append("")
    return "\n".join(parts)


HEADER = [
    *(
        "N",
        "words",
        "type",
        "pass",
        "depth",
        "ours (p20 – p80)",
        "replayed",
        "of floor",
        "launches",
        "memory",
    ),
    *(f"{rival} / ours: medians (minima)" for rival in candidates.NAMES[1:]),
    "memory, reference / ours",
    "",
]


def show(result: dict[str, Any]) -> list[str]:
    """One line of the table; after a semicolon ratios of replayed graphs; without ours, rivals' times instead."""
    entries, ratios = result["candidates"], result["ratios"]
    ours = entries.get("fused", {})
    passes = {"forward": "F", "forward+backward": "F+B"}[result["direction"]]
    cells = [f"{result['nodes']:,}", result["masks"], result["precision"], passes, str(result["depth"])]
    if "timing" in ours:
        timing = ours["timing"]
        low, middle, high = map(harness.duration, (timing.p20, timing.median, timing.p80))
        best = "replay" if "replay" in ours else "timing"
        cells += [
            f"{middle} ({low} – {high})",
            harness.duration(ours["replay"].median) if "replay" in ours else "–",
            f"{100 * ours[f'{best}_floor_reached']:.1f} % ({result['floor']['bound']})",
            str(ours.get("launches", "–")),
            harness.memory(ours["peak_memory"]),
        ]
    else:
        cells += ["–"] * 5
    for rival in candidates.NAMES[1:]:
        ratio = ratios.get(rival)
        if ratio:
            both = [
                f"{ratio[k]:.2f} ({ratio[f'{k}_minimum']:.2f})" for k in ("timing", "replay") if k in ratio
            ]
            cells.append("; ".join(both))
        elif "timing" in entries.get(rival, {}):
            cells.append(harness.duration(entries[rival]["timing"].median))
        else:
            cells.append("–")
    cells.append(f"{ratios['reference']['memory']:.1f}" if "reference" in ratios else "–")
    lost = [name for name, ratio in ratios.items() if min(ratio["timing"], ratio.get("replay", 9.0)) < 1]
    cells.append(f"LOST to {' and '.join(lost)}" if lost else "")
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--operators", nargs="+", choices=problems.OPERATORS, default=list(problems.OPERATORS)
    )
    parser.add_argument("--nodes", nargs="+", type=int, help="N, the most telling first")
    parser.add_argument(
        "--depths", nargs="+", type=int, help="layers of history, where an operator takes any"
    )
    parser.add_argument("--precision", nargs="+", choices=problems.PRECISIONS)
    parser.add_argument("--masks", nargs="+", choices=problems.MASKS, default=list(problems.MASKS))
    parser.add_argument("--seconds-budget", type=float, help="start no new problem after so many seconds")
    parser.add_argument("--compile-only", action="store_true", help="only fill torch.compile's cache on disk")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has already")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "operators: there is no CUDA device\n")
    if device == "cpu" and "tf32" in (arguments.precision or ()):
        parser.exit(2, "operators: tf32 is a GPU's precision: use ieee or bfloat16 on the CPU\n")
    smallest = Problem("graph_attention", 0).emotions + 1
    if any(size < smallest for size in arguments.nodes or ()):
        parser.exit(2, f"operators: --nodes: at least {smallest}: 32 emotions and one word\n")
    wanted = plan(device, arguments.operators, arguments.nodes, arguments.precision, arguments.depths)
    if arguments.compile_only:
        for problem, direction in wanted:
            for name, seconds in Runner(problem, direction, device, ("compiled", "flex")).compile():
                print(
                    problem.operator, problem.nodes, problem.precision, direction, name, seconds, flush=True
                )
        return

    def done(results: list[dict[str, Any]]) -> None:
        if arguments.out:
            harness.write_json(arguments.out, "operators", results)

    before = load(arguments.out) if arguments.resume and arguments.out and arguments.out.exists() else ()
    budget = arguments.seconds_budget
    try:
        results = run(wanted, device, masks=arguments.masks, budget=budget, done=done, before=before)
    except LostDeviceError:
        parser.exit(LOST_DEVICE, "operators: an error took the GPU away; --resume goes on behind it\n")
    print(report(results))


if __name__ == "__main__":
    main()
