"""``ecore reproduce``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from ecore.cli.common import add_device, check_graph_form, device
from ecore.config import PRESETS, ModelConfig, TrainingConfig, add_arguments, overrides
from ecore.errors import InputError


def declare_reproduce(parser: argparse.ArgumentParser) -> None:
    """The paper's experiments: train what a table or figure needs, and write it beside the paper's numbers.

    what there is:
      table1   with the plain Transformer        table7   spread over five seeds
      table3   several emotions a dialogue       table8   without gate, generation loss, commonsense
      table4   without graph, co-p, co-loss ...  table9   sources of word intensities
      table6   on a pre-trained model            cases    contexts, emotions and answers
      figure2  secondary emotions in the data    figure4  emotion correlations, data and model
      figure5  word-to-emotion edges             figure6  before and after aggregation

    OUT:
      runs/NAME is one run's folder: `ecore chat OUT/runs/soft-seed0`. A run that several tables show is
      trained once. What is done is skipped, and what was interrupted continues, so the same command again is always
      right; Ctrl-C is safe. One that fails does not stop the others: its row says why.

    examples:
      ecore reproduce table4 --data prepared --out paper --steps 200 --seeds 2
      ecore reproduce all --data prepared --out paper --seeds 5 --jobs 2
      ecore reproduce table1 --data prepared --out paper --baselines
      ecore reproduce table9 --data prepared --out paper --intensity-file vad=vad.tsv sentiwordnet=swn.tsv.gz
      ecore reproduce table3 --data prepared --out paper --multi-emotion labels.jsonl
      ecore reproduce table6 --data prepared --out paper --backbone microsoft/DialoGPT-small
      ecore reproduce table4 --data prepared --out paper --plan
      ecore reproduce table1 --data prepared --out letter --no-graph-norm --score-scale 1
    """
    from ecore.paper.published import EXPERIMENTS

    parser.add_argument(
        "what",
        nargs="+",
        choices=(*EXPERIMENTS, "all"),
        metavar="WHAT",
        help="tables, figures, cases, or all",
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="PREPARED", help="folder made by `ecore prepare`"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for runs and tables")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="runs of each row, seeds 0 to N-1 (default: 1; table7 5)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="training steps of a run (default: the preset's; paper 26000)"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="begin OUT, print the runs that are not done as commands, and train nothing; afterwards the same "
        "command without --plan writes the tables",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="score only the first N test samples (default: all)"
    )
    parser.add_argument(
        "--intensity-file",
        type=_source_and_file,
        nargs="+",
        action="extend",
        default=[],
        metavar="SOURCE=FILE",
        help="word scores for table9: skep, vad or sentiwordnet, as `ecore prepare` reads them",
    )
    parser.add_argument(
        "--multi-emotion",
        type=Path,
        metavar="FILE",
        help='labels for table3, lines of {"conv_id": ..., "emotions": [true one, ...]}',
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="train table1's other systems, too: as their authors publish them, and at our size",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=0,
        metavar="N",
        help="dialogue of figure5 and figure6, in the test split",
    )
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="named settings to start from")
    parser.add_argument(
        "--literal-thresholds",
        action="store_true",
        help="take thresholds as they are, instead of matching them to the data's intensities",
    )
    add_device(parser)
    given = "of all runs; each flag overrides the preset; the defaults shown are the preset paper's"
    # What a row of a table is about is not for the user to set; --steps and --seeds stand above.
    add_arguments(
        parser.add_argument_group("model", given),
        ModelConfig,
        skip=("model", "strategy", "emotions", "ablations"),
    )
    add_arguments(parser.add_argument_group("training", given), TrainingConfig, skip=("max_steps", "seed"))


def run_reproduce(arguments: argparse.Namespace) -> int:
    for name in ("seeds", "steps", "jobs", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}: expected at least 1, got {value}")
    from ecore.paper.experiments.plan import Settings
    from ecore.paper.experiments.reproduce import reproduce

    model, training = PRESETS[arguments.preset]
    changes = overrides(arguments, ModelConfig)
    backbone, inferences = changes.pop("backbone", None), changes.pop("inferences", None)
    training = dataclasses.replace(training, **overrides(arguments, TrainingConfig))
    if training.precision == "auto":
        raise InputError("--precision auto: expected one that all runs have, whenever they are trained")
    if arguments.steps is not None:
        training = dataclasses.replace(training, max_steps=arguments.steps)
    model = dataclasses.replace(model, **changes)
    check_graph_form(model, changes)
    outcome = reproduce(
        arguments.what,
        arguments.data,
        arguments.out,
        Settings(
            arguments.preset,
            model,
            training,
            arguments.literal_thresholds,
            arguments.limit,
        ),
        seeds=arguments.seeds,
        intensity_files=dict(arguments.intensity_file),
        multi_emotion=arguments.multi_emotion,
        backbone=backbone,
        baselines=arguments.baselines,
        inferences=None if inferences is None else os.path.realpath(inferences),
        sample=arguments.sample,
        jobs=arguments.jobs,
        device=device(arguments),
        threads=arguments.threads,
        plan_only=arguments.plan,
    )
    if outcome.interrupted:
        print(
            f"interrupted; what is done is in {arguments.out}, and the same command continues from there",
            file=sys.stderr,
        )
        return 130
    reasons: dict[str, list[str]] = {}
    for name, why in outcome.failures.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        log = arguments.out / "logs" / f"{names[0]}.log"
        see = f" (see {log})" if log.exists() else ""
        print(f"ecore: error: {', '.join(names)} failed: {why}{see}", file=sys.stderr)
    return 1 if outcome.failures else 0


def _source_and_file(text: str) -> tuple[str, Path]:
    from ecore.data.intensity import FILE_SOURCES

    source, equals, file = text.partition("=")
    if not equals or source not in FILE_SOURCES:
        *first, last = (f"{name}=FILE" for name in FILE_SOURCES)
        raise argparse.ArgumentTypeError(f"expected {', '.join(first)} or {last}, got {text!r}")
    return source, Path(file)
