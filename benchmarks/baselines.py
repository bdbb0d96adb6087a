"""A training step of E-CORE and of each of its rivals, in turn on the same batches.

    python -m benchmarks.baselines --data PREPARED [--preset paper] [--inferences FILE] [--out FILE.json]

A time is forward, backward and optimiser on 16 samples of a prepared folder, which needs relations for KEMP. The
systems run in turn on each batch, in one process: a machine's slow moments do not move the medians of their ratios to
E-CORE's time. Without ``--inferences`` CEM reads made-up ones of 20 words by each relation.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from benchmarks.training.steps import WITHOUT, Steps
from benchmarks.workload import Workload, wait
from ecore.baselines import BASELINES
from ecore.baselines.inferences import RELATIONS, Inferences, InferenceSplit, with_inferences
from ecore.config import PRESETS, for_model
from ecore.data.batches import Batch, length_buckets
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import CLS, SPECIAL_WORDS
from ecore.errors import InputError
from ecore.model import ECore

BATCH_SIZE = 16
INFERRED_WORDS = 20


def workloads(data: PreparedData, preset: str, inferences: Path | None, number: int) -> dict[str, Workload]:
    """Return E-CORE and its rivals with the first ``number`` batches of an epoch, by the systems' names."""
    size = PRESETS[preset][0]
    size = dataclasses.replace(size, thresholds=data.thresholds(size.thresholds))
    rows = length_buckets(data.train, BATCH_SIZE, seed=0, epoch=0)[:number]
    batches: list[tuple[Any, int]] = [
        (data.train.batch(row), int(data.train.response_lengths[row].sum())) for row in rows
    ]
    works = {}
    systems: dict[str, type[ECore]] = {"ecore": ECore, **BASELINES}
    for name, system in systems.items():
        config = for_model(size, name)

        def model(system: type[ECore] = system, config: Any = config) -> ECore:
            torch.manual_seed(0)
            return system(config, data.vocabulary, data.tables, data.embeddings).train()

        own = batches
        if name == "cem" and inferences is not None:
            split = InferenceSplit(data.train, Inferences.load(inferences), data.vocabulary)
            own = [(split.batch(row), tokens) for row, (_, tokens) in zip(rows, batches, strict=True)]
        elif name == "cem":
            own = [
                (made_up(batch, len(data.vocabulary), i), tokens) for i, (batch, tokens) in enumerate(batches)
            ]
        works[name] = Workload(model, own, preset, lambda device: data.train, list(rows))
    return works


def made_up(batch: Batch, words: int, seed: int) -> Any:
    """Return ``batch`` with random inferences."""
    shape = (len(batch.context), len(RELATIONS), 1 + INFERRED_WORDS)
    ids = np.random.default_rng(seed).integers(len(SPECIAL_WORDS), words, shape)
    ids[..., 0] = CLS
    return with_inferences(batch, ids)


def compare(works: dict[str, Workload], rounds: int, device: str) -> list[dict[str, Any]]:
    """Return each system's weights and its times of a step, the systems in turn on each batch."""
    steps: dict[str, Steps] = {}
    rows: list[dict[str, Any]] = []
    for name, work in works.items():
        try:
            steps[name] = Steps(work, list(WITHOUT), device)
        except InputError as error:  # KEMP without relations: the others are still measured
            rows.append({"system": name, "refused": str(error)})
    for one in steps.values():
        one.take_number(0)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name, one in steps.items():
            wait(device)
            begin = time.perf_counter()
            one.take_number(turn)
            wait(device)
            times[name].append(time.perf_counter() - begin)
    for name, one in steps.items():
        ratios = [own / ecore for own, ecore in zip(times[name], times["ecore"], strict=True)]
        rows.append(
            {
                "system": name,
                "parameters": sum(p.numel() for p in one.model.parameters()),
                "median_seconds": statistics.median(times[name]),
                "of_ecore": statistics.median(ratios),
            }
        )
    return rows


def report(rows: Sequence[dict[str, Any]], preset: str) -> str:
    """Return the results as a table."""
    lines = [
        [
            row["system"],
            f"{row['parameters'] / 1e6:.2f} M",
            harness.duration(row["median_seconds"]),
            f"{row['of_ecore']:.2f}",
        ]
        for row in rows
        if "refused" not in row
    ]
    left_out = [f"- {row['system']}: {row['refused']}" for row in rows if "refused" in row]
    header = ["system", "parameters", "a step, median", "of E-CORE's"]
    return "\n\n".join([f"preset {preset}, batches of {BATCH_SIZE}", harness.table(header, lines), *left_out])


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("benchmarks.baselines", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="a prepared folder")
    parser.add_argument(
        "--preset", choices=("baseline", "paper", "tiny"), default="baseline", help="the sizes"
    )
    parser.add_argument("--inferences", type=Path, help="inferences for CEM")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=24, help="steps of each system")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args(argv)
    try:
        works = workloads(
            PreparedData.load(arguments.data), arguments.preset, arguments.inferences, arguments.rounds
        )
    except InputError as error:
        parser.error(str(error))
    rows = compare(works, arguments.rounds, arguments.device)
    print(report(rows, arguments.preset))
    if arguments.out:
        document = {"preset": arguments.preset, "device": arguments.device, "systems": rows}
        harness.write_json(arguments.out, "baselines", [document])


if __name__ == "__main__":
    main()
