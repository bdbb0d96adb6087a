"""``ecore train``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecore.cli.common import add_device, check_graph_form, device
from ecore.config import (
    ABLATIONS,
    BASELINES,
    PRESETS,
    PUBLISHED_SIZES,
    WORD_LEVEL,
    ModelConfig,
    TrainingConfig,
    add_arguments,
    for_model,
    overrides,
    without_effect,
)
from ecore.errors import InputError
from ecore.training.tracker import TRACKERS

if TYPE_CHECKING:
    from ecore.data.prepared import PreparedData
    from ecore.training.run_folder import Settings


def declare_train(parser: argparse.ArgumentParser) -> None:
    """Train a model in a run folder, or go on with --resume.

    the run folder:
      config.json, vocabulary.json, the best and the last checkpoint, metrics.jsonl, TensorBoard events
      Ctrl-C finishes the step and leaves a checkpoint; twice stops at once. A run that is killed loses at most two
      minutes of steps (N steps with --checkpoint-every N) and a validation under way.

    presets:
      paper      the paper's sizes and schedule: three minutes on an H200, hours on a CPU
      released   the authors' published command and graph: 4 + 4 narrow blocks without dropout, copying, emotions' start
      baseline   the paper's rivals' sizes: 1 + 1 narrow blocks without dropout; --strategy none: their Transformer
      tiny       seconds to minutes on a laptop

    examples:
      ecore train --data prepared --out run --preset tiny
      ecore train --data prepared --out run --preset paper --strategy hard --warmup 1000 --max-steps 5000
      ecore train --data prepared --out run --ablate co-p co-g
      ecore train --data prepared --out run --precision auto
      ecore train --data prepared --out run --strategy none --emotions --emotion-start     no graph
      ecore train --data prepared --out run --model mime              a rival, as its authors publish it
      ecore train --data prepared --out run --model mime --preset paper          the same at E-CORE's sizes
      ecore train --data prepared --out run --backbone microsoft/DialoGPT-small \\
          --dropout 0.1 --factor 0.03 --warmup 1000
      ecore train --out run --resume
      ecore train --out run --resume --max-steps 10000
      torchrun --nproc-per-node 2 -m ecore train --data prepared --out run     on two GPUs, or two CPU processes
      tensorboard --logdir run
    """
    parser.add_argument(
        "--data", type=Path, metavar="PREPARED", help="folder made by `ecore prepare`; --resume knows its own"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on with RUN; only --max-steps may change")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help=f"named settings to start from (default: paper; with --model of a rival {PUBLISHED_SIZES})",
    )
    parser.add_argument(
        "--literal-thresholds",
        action="store_true",
        help="take thresholds as they are, instead of matching them to this data's intensities",
    )
    add_device(parser)
    parser.add_argument(
        "--log-to",
        choices=TRACKERS,
        help="send the log to this experiment tracker, too (pip install it first)",
    )
    given = "each flag overrides the preset; the defaults shown are the preset paper's"
    model = parser.add_argument_group("model", given)
    model.add_argument(
        "--ablate",
        dest="ablations",
        nargs="+",
        action="extend",
        choices=ABLATIONS,
        metavar="PART",
        help=f"parts to leave out: {', '.join(ABLATIONS)}",
    )
    add_arguments(model, ModelConfig, skip=("ablations",))
    add_arguments(parser.add_argument_group("training", given), TrainingConfig)


def run_train(arguments: argparse.Namespace) -> int:
    if arguments.data is None and not arguments.resume:
        raise InputError("--data: expected a folder made by `ecore prepare`")
    from ecore.data.prepared import PreparedData
    from ecore.pretrained import data_folder
    from ecore.training import distributed
    from ecore.training.allocator import keep_freed_memory
    from ecore.training.run_folder import read_settings
    from ecore.training.trainer import train

    settings = read_settings(arguments.out) if arguments.resume else None
    data = PreparedData.load(arguments.data or data_folder(arguments.out))
    model_config = training = None
    preset = arguments.preset
    if settings is not None:
        _check_resumed(arguments, settings, data)
    else:
        given = overrides(arguments, ModelConfig)
        rival = given.get("model") in BASELINES
        preset = preset or (PUBLISHED_SIZES if rival else "paper")
        model_config, training = PRESETS[preset]
        model_config = for_model(model_config, given.get("model", "ecore"))
        if not rival and given.get("strategy") == "none" and not given.get("emotions"):
            given = {"emotion_start": False} | given  # the preset's would have nothing to start from
        if given.get("backbone") is not None:
            _check_backbone(given)
            given["graph_form"] = "paper"  # the preset's may be the released code's, which reads words
        model_config = dataclasses.replace(model_config, **given)
        check_graph_form(model_config, given)
        _note_idle(model_config, overrides(arguments, ModelConfig), arguments.literal_thresholds)
        training = dataclasses.replace(training, **overrides(arguments, TrainingConfig))
        thresholds = data.thresholds(model_config.thresholds, arguments.literal_thresholds)
        model_config = dataclasses.replace(model_config, thresholds=thresholds)
    where: Any = device(arguments)
    if where == "cpu":
        keep_freed_memory()
    processes = None
    if distributed.launched():
        processes, where = distributed.join(where)
    with distributed.parted():
        summary = train(
            arguments.out,
            data,
            model_config,
            training,
            device=where,
            resume=arguments.resume,
            max_steps=arguments.max_steps if arguments.resume else None,
            preset=preset,
            processes=processes,
            log_to=arguments.log_to,
        )
    distributed.leave()
    if processes is not None and not processes.first:
        return 130 if summary["interrupted"] else 0
    done = f"{arguments.out}: step {summary['step']:,} of {summary['max_steps']:,}"
    if summary["interrupted"]:
        print(f"{done}, checkpoint written; go on with: ecore train --out {arguments.out} --resume")
        return 130
    early = ", stopped early: validation no longer improves" if summary["stopped_early"] else ""
    if summary["best_step"] is None:
        print(
            f"{done}, never validated; train on with: ecore train --out {arguments.out} --resume --max-steps N"
        )
        return 0
    print(
        f"{done}{early}; best validation perplexity {summary['best_ppl_per_sample']:.2f} per sample at step "
        f"{summary['best_step']:,}; {summary['seconds']:.0f} s, {summary['peak_memory_mib']:,.0f} MiB"
    )
    print(f"next: ecore evaluate {arguments.out}   or   ecore chat {arguments.out}")
    return 0


def _check_backbone(given: dict[str, Any]) -> None:
    """Refuse flags that a backbone has no use for."""
    for name in WORD_LEVEL:
        if name in given:
            raise InputError(f"--{name.replace('_', '-')}: of no use with --backbone, which has its own")


def _note_idle(config: ModelConfig, given: Mapping[str, Any], literal_thresholds: bool) -> None:
    """Say in a line which flags change nothing; `ecore reproduce --plan` gives all runs of a table the same flags."""
    reasons: dict[str, list[str]] = {}
    for name, why in without_effect(config).items():
        if name in given:
            reasons.setdefault(why, []).append("--" + name.replace("_", "-"))
        if name == "thresholds" and literal_thresholds:
            reasons.setdefault(why, []).append("--literal-thresholds")
    for why, flags in reasons.items():
        print(f"{', '.join(flags)}: of no effect: {why}", file=sys.stderr)


def _check_resumed(arguments: argparse.Namespace, settings: Settings, data: PreparedData) -> None:
    """Refuse flags that contradict the run that is to go on."""
    given: dict[str, Any] = overrides(arguments, ModelConfig) | overrides(arguments, TrainingConfig)
    given.pop("max_steps", None)
    if given.get("precision") == "auto":  # the run has the one that was found
        del given["precision"]
    if arguments.preset is not None:
        given["preset"] = arguments.preset
    if arguments.literal_thresholds or "thresholds" in given:
        # A run that Python code started may have a preset of any name, or none.
        preset = PRESETS.get(settings.preset or "paper", PRESETS["paper"])
        base = given.get("thresholds", preset[0].thresholds)
        given["thresholds"] = data.thresholds(base, arguments.literal_thresholds)
    stored = vars(settings.model) | vars(settings.training) | {"preset": settings.preset}
    for name, value in given.items():
        if stored[name] != value:
            flag = "--ablate" if name == "ablations" else "--" + name.replace("_", "-")
            raise InputError(
                f"{flag}: {arguments.out} was started with {stored[name]}, not {value}; "
                "with --resume only --max-steps may change"
            )
