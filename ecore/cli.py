"""The command line, ``ecore COMMAND ...``: flags in, one call of the library, lines and an exit code out.

Exit codes: 0 done, 1 training diverged or memory ran out, 2 bad input (one line on stderr says what), 130
interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecore.config import (
    ABLATIONS,
    PRESETS,
    ModelConfig,
    TrainingConfig,
    add_arguments,
    overrides,
)
from ecore.errors import InputError

if TYPE_CHECKING:
    from ecore.data.batches import PreparedData
    from ecore.model import ECore
    from ecore.training.run_folder import Settings

# torch takes seconds to import: commands import what they need, and `ecore --help` answers at once.

INTENSITIES = ("vader", "sentiwordnet", "vad", "skep", "none")
VOCABULARIES = ("literature", "train")
SHOWN_EMOTIONS = 3


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Paragraphs as written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(argv[0] if argv else None)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\necore: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ecore ... | head`: nobody is left to read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:
        return _fail(error, 2)
    except (ArithmeticError, MemoryError) as error:
        return _fail(error, 1)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it for every command
            return _fail("the GPU's memory is full; try a smaller --batch-size (and --accumulate)", 1)
        raise


def _fail(error: object, code: int) -> int:
    print(f"ecore: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return code


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ecore",
        description="Empathetic dialogue over a multi-resolution emotion graph (E-CORE, EMNLP 2023).",
        epilog="start here:  ecore demo          the whole story on a built-in corpus, in minutes\n"
        "your data:   ecore prepare, then ecore train, ecore evaluate, ecore chat\n"
        "each command has its own page:  ecore train --help",
        formatter_class=_Help,
    )
    version = f"ecore {_version()}"
    parser.add_argument("--version", action="version", version=version, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (summary, declare, run) in COMMANDS.items():
        description, _, epilog = (inspect.getdoc(declare) or "").partition("\n\n")
        sub = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=epilog,
            formatter_class=_Help,
        )
        sub.set_defaults(run=run)
        if name == command:  # declaring flags may import what they are made from
            declare(sub)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("ecore")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def _device(arguments: argparse.Namespace) -> str:
    import torch

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise InputError(f"--threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; `ecore info` says why")
    if arguments.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(arguments.device)


# prepare


def _declare_prepare(parser: argparse.ArgumentParser) -> None:
    """Turn a corpus into a prepared folder: words, vocabulary, emotion intensities, word vectors. Done once.

    the corpus:
      FOLDER holds train, valid and test, each as .jsonl or as EmpatheticDialogues' official .csv.
      With --download the official archive is fetched into FOLDER first.

    examples:
      ecore prepare --data empatheticdialogues --out prepared --glove glove.6B.100d.txt
      ecore prepare --data empatheticdialogues --out prepared --download
      ecore prepare --data my_corpus --out prepared --vocabulary train --min-count 3
      ecore prepare --data my_corpus --out prepared --intensity vad --intensity-file vad.tsv
    """
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the corpus")
    parser.add_argument("--out", type=Path, required=True, metavar="PREPARED", help="folder to make")
    parser.add_argument("--download", action="store_true", help="fetch EmpatheticDialogues into FOLDER first")
    parser.add_argument(
        "--glove",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="word vectors (.txt, .gz, .zip, .npz); several files stand side by side (default: none)",
    )
    parser.add_argument(
        "--intensity", choices=INTENSITIES, default="vader", help="source of word intensities"
    )
    parser.add_argument(
        "--intensity-file", type=Path, metavar="FILE", help="the source's word scores; not for vader and none"
    )
    parser.add_argument(
        "--intensity-floor", type=float, default=0.01, metavar="X", help="least intensity of a word"
    )
    parser.add_argument(
        "--vocabulary",
        choices=VOCABULARIES,
        default="literature",
        help="literature: every word of all splits, as in the literature; train: of the training split",
    )
    parser.add_argument(
        "--min-count", type=int, default=2, metavar="N", help="vocabulary train: least count of a word"
    )
    parser.add_argument(
        "--relations", type=Path, metavar="FILE", help="commonsense relations (default: none)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="skip and count torn lines, instead of stopping"
    )


def _prepare(arguments: argparse.Namespace) -> int:
    from ecore.data.corpus import download
    from ecore.data.prepare import prepare

    if arguments.download:
        download(arguments.data)
    prepare(
        arguments.data,
        arguments.out,
        glove=arguments.glove,
        intensity=arguments.intensity,
        intensity_file=arguments.intensity_file,
        intensity_floor=arguments.intensity_floor,
        vocabulary=arguments.vocabulary,
        min_count=arguments.min_count,
        relations=arguments.relations,
        skip_bad=arguments.skip_bad,
    )
    print(f"next: ecore train --data {arguments.out} --out RUN --preset paper")
    return 0


# train


def _declare_train(parser: argparse.ArgumentParser) -> None:
    """Train a model in a run folder, or go on with --resume.

    the run folder:
      config.json, vocabulary.json, the best and the last checkpoint, metrics.jsonl, TensorBoard events
      Ctrl-C finishes the step and leaves a checkpoint; twice stops at once.

    presets:
      paper      the paper's sizes and schedule: hours on a CPU, minutes on a GPU
      released   the sizes of the authors' released code
      tiny       seconds to minutes on a laptop

    examples:
      ecore train --data prepared --out run --preset tiny
      ecore train --data prepared --out run --preset paper --strategy hard --warmup 1000 --max-steps 5000
      ecore train --data prepared --out run --ablate co-p co-g
      ecore train --out run --resume
      ecore train --out run --resume --max-steps 10000
      tensorboard --logdir run
    """
    parser.add_argument(
        "--data", type=Path, metavar="PREPARED", help="folder made by `ecore prepare`; --resume knows its own"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on with RUN; only --max-steps may change")
    parser.add_argument("--preset", choices=PRESETS, help="named settings to start from (default: paper)")
    parser.add_argument(
        "--literal-thresholds",
        action="store_true",
        help="take thresholds as they are, instead of matching them to this data's intensities",
    )
    _add_device(parser)
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


def _train(arguments: argparse.Namespace) -> int:
    if arguments.data is None and not arguments.resume:
        raise InputError("--data: expected a folder made by `ecore prepare`")
    from ecore.data.batches import PreparedData
    from ecore.training.run_folder import read_settings
    from ecore.training.trainer import train

    settings = read_settings(arguments.out) if arguments.resume else None
    data = PreparedData.load(arguments.data or Path(str(settings and settings.data.get("folder"))))
    model_config = training = None
    if settings is not None:
        _check_resumed(arguments, settings, data)
    else:
        model_config, training = PRESETS[arguments.preset or "paper"]
        model_config = dataclasses.replace(model_config, **overrides(arguments, ModelConfig))
        training = dataclasses.replace(training, **overrides(arguments, TrainingConfig))
        thresholds = data.thresholds(model_config.thresholds, arguments.literal_thresholds)
        model_config = dataclasses.replace(model_config, thresholds=thresholds)
    summary = train(
        arguments.out,
        data,
        model_config,
        training,
        device=_device(arguments),
        resume=arguments.resume,
        max_steps=arguments.max_steps if arguments.resume else None,
        preset=arguments.preset or "paper",
    )
    done = f"{arguments.out}: step {summary['step']:,} of {summary['max_steps']:,}"
    if summary["interrupted"]:
        print(f"{done}, checkpoint written; go on with: ecore train --out {arguments.out} --resume")
        return 130
    early = ", stopped early: validation no longer improves" if summary["stopped_early"] else ""
    print(
        f"{done}{early}; best validation perplexity {summary['best_ppl_per_sample']:.2f} per sample at step "
        f"{summary['best_step']:,}; {summary['seconds']:.0f} s, {summary['peak_memory_mib']:,.0f} MiB"
    )
    print(f"next: ecore evaluate {arguments.out}   or   ecore chat {arguments.out}")
    return 0


def _check_resumed(arguments: argparse.Namespace, settings: Settings, data: PreparedData) -> None:
    """Refuse flags that contradict the run that is to go on."""
    given: dict[str, Any] = overrides(arguments, ModelConfig) | overrides(arguments, TrainingConfig)
    given.pop("max_steps", None)
    if arguments.preset is not None:
        given["preset"] = arguments.preset
    if arguments.literal_thresholds or "thresholds" in given:
        base = given.get("thresholds", PRESETS[settings.preset or "paper"][0].thresholds)
        given["thresholds"] = data.thresholds(base, arguments.literal_thresholds)
    stored = vars(settings.model) | vars(settings.training) | {"preset": settings.preset}
    for name, value in given.items():
        if stored[name] != value:
            flag = "--ablate" if name == "ablations" else "--" + name.replace("_", "-")
            raise InputError(
                f"{flag}: {arguments.out} was started with {stored[name]}, not {value}; "
                "with --resume only --max-steps may change"
            )


# evaluate


def _declare_evaluate(parser: argparse.ArgumentParser) -> None:
    """Score a run on a split, with simple yardsticks beside it; or score anybody's predictions.

    Perplexities compare only under one vocabulary. What was predicted and measured is kept in
    RUN/evaluation-SPLIT.

    examples:
      ecore evaluate run
      ecore evaluate run --split valid --limit 500
      ecore evaluate --predictions theirs.jsonl      lines of {"prediction": ..., "reference": ...}
    """
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN", help="folder made by `ecore train`")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="JSON lines to score instead of a run"
    )
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test", help="what to score")
    parser.add_argument(
        "--data", type=Path, metavar="PREPARED", help="prepared folder (default: the run's own)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where files go (default: RUN/evaluation-SPLIT)"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples at once")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples")
    _add_device(parser)


def _evaluate(arguments: argparse.Namespace) -> int:
    if (arguments.folder is None) == (arguments.predictions is None):
        raise InputError("evaluate: expected either a run's folder or --predictions FILE")
    from ecore.evaluation.predictions import evaluate_file
    from ecore.evaluation.report import evaluate_run, format_file

    if arguments.predictions is not None:
        print(format_file(evaluate_file(arguments.predictions)))
        return 0
    evaluate_run(
        arguments.folder,
        arguments.split,
        arguments.data,
        _device(arguments),
        arguments.batch_size,
        arguments.out,
        arguments.limit,
    )
    return 0


# generate and chat


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    from ecore.generation import Decoding

    parser.add_argument("folder", type=Path, metavar="RUN", help="folder made by `ecore train`")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which weights")
    add_arguments(parser.add_argument_group("decoding"), Decoding)
    _add_device(parser)


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    from ecore.generation import Decoding

    options = overrides(arguments, Decoding)
    Decoding(**options)  # what is out of range should be said before a model is loaded
    return options


def _load(arguments: argparse.Namespace) -> ECore:
    from ecore.model import ECore

    return ECore.from_pretrained(arguments.folder, arguments.checkpoint, _device(arguments))


def _declare_generate(parser: argparse.ArgumentParser) -> None:
    """Answer a dialogue given on the command line, or every context of a split.

    Several --text are the turns of one dialogue, the speaker's first and then alternating.

    examples:
      ecore generate run --text "I lost my keys and I am so annoyed."
      ecore generate run --text "My dog died." --text "I am so sorry." --text "He was twelve." --method beam
      ecore generate run --split test --out answers.jsonl
      ecore generate run --text "I got the job!" --method sample --top-p 0.9 --seed 1
    """
    _add_decoding(parser)
    parser.add_argument(
        "--text", action="append", metavar="TURN", help="one turn of the dialogue; repeat for more"
    )
    parser.add_argument("--split", choices=("train", "valid", "test"), help="answer this split instead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --split: JSON lines to write")
    parser.add_argument(
        "--data", type=Path, metavar="PREPARED", help="with --split: prepared folder (default: the run's own)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="with --split: samples at once"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="with --split: only the first N samples")


def _generate(arguments: argparse.Namespace) -> int:
    if (arguments.text is None) == (arguments.split is None):
        raise InputError("generate: expected either --text TURN or --split NAME --out FILE")
    options = _decoding(arguments)
    if arguments.text is not None:
        model = _load(arguments)
        reply = model.respond(arguments.text, **options)
        print(reply)
        print(f"perceived: {_perceived(reply.emotions)}")
        return 0
    if arguments.out is None:
        raise InputError("--out: expected a file for the answers of --split")
    from ecore.data.batches import PreparedData
    from ecore.evaluation.predictions import write_predictions
    from ecore.generation import Decoding
    from ecore.training.run_folder import read_settings

    folder = arguments.data or Path(str(read_settings(arguments.folder).data.get("folder")))
    data = PreparedData.load(folder)
    model = _load(arguments)
    if data.vocabulary.fingerprint != model.vocabulary.fingerprint:
        raise InputError(f"{folder}: not the vocabulary that {arguments.folder} was trained with")
    records = write_predictions(
        model,
        getattr(data, arguments.split),
        arguments.out,
        Decoding(**options),
        arguments.batch_size,
        arguments.limit,
    )
    print(
        f"{arguments.out}: {len(records):,} answers; score them: ecore evaluate --predictions {arguments.out}"
    )
    return 0


def _perceived(emotions: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in emotions[:SHOWN_EMOTIONS])


def _declare_chat(parser: argparse.ArgumentParser) -> None:
    """Talk with a model; the emotions that it perceives stand beside each answer.

    It remembers the dialogue. /reset forgets it; /quit, Ctrl-D or Ctrl-C leaves. Lines may come from a pipe.

    examples:
      ecore chat run
      ecore chat run --method sample --top-p 0.9 --temperature 0.8
      printf 'I failed my exam.\\nI studied so hard.\\n' | ecore chat run
    """
    _add_decoding(parser)


def _chat(arguments: argparse.Namespace) -> int:
    options = _decoding(arguments)
    model = _load(arguments)
    asks = sys.stdin.isatty()
    if asks:
        print("Tell me about it. (/reset forgets the dialogue, /quit leaves.)")
    turns: list[str] = []
    try:
        while True:
            line = input("you: " if asks else "").strip()
            if line == "/quit":
                return 0
            if line == "/reset":
                turns = []
                print("(forgotten)")
            elif line.startswith("/"):
                print("(commands: /reset, /quit)")
            elif line:
                reply = model.respond([*turns, line], **options)
                turns += [line, str(reply)]
                print(f"ecore: {reply}\n       [{_perceived(reply.emotions)}]", flush=True)
    except (EOFError, KeyboardInterrupt):
        if asks:
            print("\nGoodbye.")
        return 0


# demo and info


def _declare_demo(parser: argparse.ArgumentParser) -> None:
    """The whole story on a small built-in corpus: prepare, train, evaluate, answer. Minutes on any machine.

    examples:
      ecore demo
      ecore demo --out /tmp/ecore-demo --steps 300
    """
    parser.add_argument(
        "--out", type=Path, default=Path("ecore-demo"), metavar="FOLDER", help="where it works"
    )
    parser.add_argument(
        "--strategy", choices=("soft", "hard"), default="soft", help="how emotions guide the answer"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: the demo's own)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random")
    _add_device(parser)


def _demo(arguments: argparse.Namespace) -> int:
    from ecore import demo

    demo.run(
        arguments.out,
        strategy=arguments.strategy,
        steps=arguments.steps,
        seed=arguments.seed,
        device=_device(arguments),
    )
    return 0


def _declare_info(parser: argparse.ArgumentParser) -> None:
    """Say what is installed and which backends run here; with RUN, also what that run is and how far it came.

    examples:
      ecore info
      ecore info run
    """
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN", help="folder made by `ecore train`")


def _info(arguments: argparse.Namespace) -> int:
    from ecore_kernels import info

    print(info.report())
    if arguments.folder is not None:
        from ecore.training.run_folder import summarize

        print(f"\n{summarize(arguments.folder)}")
    return 0


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[..., int]]] = {
    "prepare": ("turn a corpus into a prepared folder", _declare_prepare, _prepare),
    "train": ("train a model, or go on with a run", _declare_train, _train),
    "evaluate": ("score a run, or anybody's predictions", _declare_evaluate, _evaluate),
    "generate": ("answer a dialogue, or a whole split", _declare_generate, _generate),
    "chat": ("talk with a model", _declare_chat, _chat),
    "demo": ("the whole story on a built-in corpus", _declare_demo, _demo),
    "info": ("what is installed, and what a run holds", _declare_info, _info),
}
