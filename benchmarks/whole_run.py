"""A whole training on a prepared folder, with validations and checkpoints: what a user waits for.

``python -m benchmarks.whole_run --data PREPARED [--preset paper] [--steps 26000] [--device cpu]
[--precision bfloat16 tf32 float32] [--out FILE.json]``

On a GPU with CUDA graphs, in each precision; on a CPU as the preset is. Results are written after each run.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from ecore.config import PRESETS
from ecore.data.prepared import PreparedData
from ecore.errors import InputError
from ecore.training.journal import read_metrics
from ecore.training.trainer import train

PAPER_STEPS = 26_000
PRECISIONS = ("bfloat16", "tf32", "float32")


def whole_run(data: Path, preset: str, steps: int, device: str, **options: Any) -> dict[str, Any]:
    """Train for ``steps``, with the preset's settings otherwise, and say what the paper's number would take.

    The estimate goes on at the pace of the run's second half; where ``steps`` are all, nothing in it is estimated.

    Args:
        options: of :class:`ecore.config.TrainingConfig`.
    """
    prepared = PreparedData.load(data)
    model, training = PRESETS[preset]
    model = dataclasses.replace(model, thresholds=prepared.thresholds(model.thresholds))
    training = dataclasses.replace(training, max_steps=steps, **options)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        summary = train(run, prepared, model, training, device=device, preset=preset, progress=False)
        lines = read_metrics(run)
    pace = statistics.median(line["seconds_per_step"] for line in lines if line["step"] > steps // 2)
    validations = [line["valid_seconds"] for line in lines if "valid_seconds" in line]
    more = max(PAPER_STEPS - steps, 0)
    return {
        "configuration": ", ".join(f"{name} {value}" for name, value in options.items()) or "as preset",
        "steps": steps,
        "seconds": summary["seconds"],
        "seconds_per_step": pace,
        "validation_seconds": statistics.median(validations),
        "peak_memory_mib": summary["peak_memory_mib"],
        "loss": lines[-1]["loss"],
        "valid_ppl_per_sample": lines[-1]["valid_ppl_per_sample"],
        "paper_seconds": summary["seconds"]
        + more * pace
        + more // training.validate_every * statistics.median(validations),
    }


def whole_runs(
    data: Path, preset: str, steps: int, device: str, precisions: Sequence[str] = PRECISIONS
) -> Iterator[dict[str, Any]]:
    """Each run as it is done: on a GPU with CUDA graphs, in each precision; on a CPU as the preset is."""
    if device == "cpu":
        yield whole_run(data, preset, steps, device)
        return
    for precision in precisions:
        torch.cuda.reset_peak_memory_stats()
        yield whole_run(data, preset, steps, device, precision=precision, cuda_graphs=True)


def report(runs: list[dict[str, Any]]) -> str:
    """A table, a row for each run."""
    header = [
        "configuration",
        "steps",
        "all",
        "a step",
        "validation",
        "26,000 steps",
        "loss",
        "valid ppl",
        "memory",
    ]
    rows = [
        [
            run["configuration"],
            f"{run['steps']:,}",
            harness.duration(run["seconds"]),
            harness.duration(run["seconds_per_step"]),
            harness.duration(run["validation_seconds"]),
            harness.duration(run["paper_seconds"]),
            f"{run['loss']:.2f}",
            f"{run['valid_ppl_per_sample']:.1f}",
            f"{run['peak_memory_mib']:,.0f} MiB",
        ]
        for run in runs
    ]
    return harness.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("benchmarks.whole_run", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="a prepared folder")
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--steps", type=int, default=PAPER_STEPS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        help="of the runs on a GPU, in this order (default: bfloat16 tf32 float32)",
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error(f"--steps: expected at least 2, got {arguments.steps}")
    if arguments.device == "cpu" and arguments.precision:
        parser.error("--precision: on a CPU runs are as the preset is")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    precisions = arguments.precision or PRECISIONS
    runs = whole_runs(arguments.data, arguments.preset, arguments.steps, arguments.device, precisions)
    try:
        done = harness.collect("whole_run", runs, arguments.out)
    except InputError as error:
        parser.error(str(error))
    print(report(done))


if __name__ == "__main__":
    main()
