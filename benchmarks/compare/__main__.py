"""Two commits side by side: ``python -m benchmarks compare BASE [HEAD] [--fail-at 5]``.

Both are checked out and built in a temporary folder (once where the C++ is the same); they share this Python and its
packages. Each side is one process. They measure the same operators and training steps in turn, the first to go
changing every round, so that a machine's slow moments fall on both. A ratio is HEAD's time over BASE's: the median of
the rounds, with a 99 % interval. With ``--fail-at X`` a slowdown of X % or more is an error, exit code 1, where the
whole interval is above 1; so is a case that BASE runs and HEAD does not. Uncommitted changes are not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from benchmarks.compare import checkouts, worker
from benchmarks.compare.ratios import FEWEST_ROUNDS, Ratio, ratio
from ecore.errors import InputError

SIDES = ("base", "head")
SECONDS = 0.05
"""Of one measurement: a call is repeated until it takes about this long."""

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""One side: a request of :mod:`benchmarks.compare.worker` to its answer."""


def measure(case: str, ask: Mapping[str, Ask], rounds: int) -> dict[str, Any]:
    """Return the seconds of both sides on one case, round by round and in turn, or why it has none."""
    result: dict[str, Any] = {"case": case}
    ready = {side: ask[side]({"case": case}) for side in SIDES}
    refused = {side: answer["refused"] for side, answer in ready.items() if "refused" in answer}
    if refused:
        return result | {"refused": refused}
    if ready["base"]["inputs"] != ready["head"]["inputs"]:
        return result | {"refused": {"head": "its inputs are not those of BASE: times do not compare"}}
    calls = max(1, min(answer["calls"] for answer in ready.values()))
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            answer = ask[side]({"case": case, "first": turn * calls, "calls": calls})
            if "refused" in answer:
                return result | {"refused": {side: answer["refused"]}}
            seconds[side].append(answer["seconds"])
    return result | {"calls": calls, "seconds": seconds, "ratio": ratio(seconds["base"], seconds["head"])}


@contextlib.contextmanager
def process(tree: Path, device: str) -> Iterator[Ask]:
    """One side's process, which has imported the packages of ``tree``.

    Raises:
        InputError: it ends early or imports other packages; with the last line that it wrote.
    """
    log = tree.parent / f"{tree.name}-measured.log"
    command = [sys.executable, str(Path(worker.__file__)), device, str(SECONDS)]
    with log.open("w") as errors:
        running = subprocess.Popen(
            command,
            cwd=tree,
            env=checkouts.environment(tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert running.stdin is not None
    assert running.stdout is not None

    def read() -> dict[str, Any]:
        line = running.stdout.readline()  # type: ignore[union-attr]
        if not line:
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {running.wait()}"]
            raise InputError(f"compare: the process of {tree.name} ended: {lines[-1]}")
        return json.loads(line)

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # read() says why
            print(json.dumps(request), file=running.stdin, flush=True)
        return read()

    try:
        record = read()
        if not Path(record["package"]).is_relative_to(tree):
            raise InputError(
                f"compare: {tree.name} imports {record['package']}, expected a package in {tree}"
            )
        if record["native"]:
            raise InputError(f"compare: {tree.name}: {record['native']}")
        yield ask
    finally:
        running.kill()
        running.communicate()


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """A table, a line for each case."""
    rows = []
    for result in results:
        if "refused" in result:
            whys = "; ".join(f"{side}: {why}" for side, why in result["refused"].items())
            rows.append([result["case"], "–", "–", "–", "–", f"not measured: {whys}"])
            continue
        found: Ratio = result["ratio"]
        times = [harness.duration(statistics.median(result["seconds"][side])) for side in SIDES]
        interval = f"{found.low:.3f} – {found.high:.3f}"
        rows.append([result["case"], *times, f"{found.median:.3f}", interval, found.verdict])
    return harness.table(["case", "BASE", "HEAD", "HEAD / BASE", "99 % interval", ""], rows)


def failures(results: Sequence[Mapping[str, Any]], percent: float) -> list[str]:
    """Return a line for each slowdown of ``percent`` or more, and each case that HEAD has lost."""
    lines = []
    for result in results:
        if "refused" in result:
            if "base" not in result["refused"]:
                lines.append(f"{result['case']}: HEAD does not run it: {result['refused']['head']}")
        elif result["ratio"].slower_by(percent):
            lines.append(f"{result['case']}: {result['ratio'].verdict}, {percent:g} % or more")
    return lines


def parser() -> argparse.ArgumentParser:
    parser = parser_of("benchmarks compare", __doc__)
    parser.add_argument("base", metavar="BASE", help="the commit, branch or tag to compare with")
    parser.add_argument(
        "head", metavar="HEAD", nargs="?", default="HEAD", help="what is compared (default: HEAD)"
    )
    parser.add_argument("--fail-at", type=float, metavar="PERCENT", help="exit with 1 at such a slowdown")
    parser.add_argument("--rounds", type=int, default=31, help="pairs of a case (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=list(worker.CASES), default=list(worker.CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.rounds < FEWEST_ROUNDS:
        command.error(f"--rounds: expected at least {FEWEST_ROUNDS}, got {arguments.rounds}")
    if arguments.fail_at is not None and not arguments.fail_at > 0:
        command.error(f"--fail-at: expected a percentage above 0, got {arguments.fail_at:g}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda: torch sees no CUDA device here")
    results: list[dict[str, Any]] = []
    try:
        base, head = (checkouts.commit(revision) for revision in (arguments.base, arguments.head))
        if arguments.head == "HEAD" and checkouts.git("status", "--porcelain", "--untracked-files=no"):
            print("compare: uncommitted changes are not measured", file=sys.stderr)
        with checkouts.checkouts(base, head) as trees, contextlib.ExitStack() as stack:
            ask = {
                side: stack.enter_context(process(tree, arguments.device))
                for side, tree in zip(SIDES, trees, strict=True)
            }
            for case in arguments.cases:
                results.append({"commits": [base, head]} | measure(case, ask, arguments.rounds))
                if arguments.out:
                    harness.write_json(arguments.out, "compare", results)
    except InputError as error:
        if results:
            print(report(results))
        command.error(str(error))
    load = os.getloadavg()[0]
    print(
        f"BASE {base[:10]}, HEAD {head[:10]}, {arguments.rounds} rounds, {harness.machine()['cpu']}, ", end=""
    )
    print(f"{torch.get_num_threads()} threads, load {load:.1f} at the end\n")
    print(report(results))
    lines = [] if arguments.fail_at is None else failures(results, arguments.fail_at)
    for line in lines:
        print(f"compare: {line}", file=sys.stderr)
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
