"""Losses of recorded training steps against single ones: recording must change no number that matters.

``python -m benchmarks.recorded --device cuda [--data PREPARED] [--preset paper] [--steps N] [--out FILE.json]``

The same model takes the same steps without dropout in three ways: in plain PyTorch, with all of this package's
improvements one launch at a time, and with those recorded as CUDA graphs. Sums in another order part such losses a
little more with each step; a difference over :data:`TOLERANCE`, a failed recording, or steps that never were recorded
are failures, and the exit code is 1. Rows are written as they come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from benchmarks.training.steps import WITHOUT, Steps
from benchmarks.workload import Workload, workload
from ecore.config import PRESETS
from ecore.errors import InputError
from ecore.training.cuda_graphs import Recorder

TOLERANCE = {"float32": 1e-3, "tf32": 5e-3, "bfloat16": 2e-2}
"""Largest relative difference of two losses of the same step, by precision; in the order of measuring."""


def losses(
    work: Workload,
    parts: Sequence[str],
    steps: int,
    device: str,
    recorder: Recorder | None = None,
    **settings: Any,
) -> list[float]:
    """The losses of ``steps`` training steps without dropout.

    Raises:
        RuntimeError: steps that should be recorded were not.

    ``steps`` go at least twice through the batches, for a shape is recorded when it comes again.
    """
    one = Steps(work, parts, device, recorder, dropout=0.0, graph_dropout=0.0, **settings)
    found = [float(one.take_number(number)) for number in range(steps)]
    recorded, shapes = one.recorded
    if recorded < shapes:  # all have come twice
        raise RuntimeError(f"of {shapes} shapes of batches {recorded} were recorded")
    return found


def compare(
    work: Workload,
    precision: str,
    steps: int,
    device: str,
    recorder: Recorder | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """A row for single steps against plain PyTorch's, and one for recorded steps against single ones."""
    kind = [] if precision == "float32" else [precision]
    ways = {
        "plain PyTorch": kind,
        "single": [*WITHOUT, *kind],
        "recorded": [*WITHOUT, *kind, "CUDA graphs"],
    }
    found: dict[str, list[float] | str] = {}
    for way, parts in ways.items():
        try:
            found[way] = losses(work, parts, steps, device, recorder, **settings)
        except Exception as error:  # the other ways still tell something
            found[way] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    rows = []
    for way, other in (("single", "plain PyTorch"), ("recorded", "single")):
        row: dict[str, Any] = {"precision": precision, "steps": steps, "compared": f"{way} / {other}"}
        mine, theirs = found[way], found[other]
        if isinstance(mine, list) and isinstance(theirs, list):
            difference = max(_difference(a, b) for a, b in zip(mine, theirs, strict=True))
            row |= {
                "difference": difference,
                "tolerance": TOLERANCE[precision],
                "last": [mine[-1], theirs[-1]],
            }
            row["passed"] = difference <= TOLERANCE[precision]
        else:
            whys = [f"{name}: {found[name]}" for name in (way, other) if isinstance(found[name], str)]
            row |= {"failed": "; ".join(whys), "passed": False}
        rows.append(row)
    return rows


def _difference(loss: float, other: float) -> float:
    """Relative; infinite where a loss is no finite number."""
    return abs(loss / other - 1) if math.isfinite(loss) and math.isfinite(other) else math.inf


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table, a line for each row."""
    cells = []
    for row in rows:
        outcome = row.get("failed") or ("ok" if row["passed"] else "BEYOND THE TOLERANCE")
        numbers = [f"{row[name]:.1e}" if name in row else "–" for name in ("difference", "tolerance")]
        cells.append([row["precision"], row["compared"], str(row["steps"]), *numbers, outcome])
    header = ["precision", "losses of", "steps", "largest relative difference", "tolerance", ""]
    return harness.table(header, cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.recorded", __doc__)
    parser.add_argument(
        "--data", type=Path, help="a prepared folder (default: made-up batches of the same sizes)"
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="paper")
    parser.add_argument("--device", choices=("cuda",), default="cuda", help="CUDA graphs are a GPU's")
    parser.add_argument(
        "--steps",
        type=int,
        default=48,
        help="of each way; the second 24 come recorded (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if arguments.steps < 2:
        parser.error(f"--steps: expected at least 2, got {arguments.steps}")
    try:
        work = workload(arguments.data, arguments.preset, number=arguments.steps // 2)
    except InputError as error:
        parser.error(str(error))
    rows: list[dict[str, Any]] = []
    for precision in TOLERANCE:
        rows += compare(work, precision, arguments.steps, arguments.device)
        if arguments.out:
            harness.write_json(arguments.out, "recorded", rows)
    print(report(rows))
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
