"""``ecore evaluate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ecore.cli.common import (
    BATCH,
    add_decoding,
    add_device,
    decoding_options,
    device,
    expect_default,
    expect_method,
)
from ecore.errors import InputError


def declare_evaluate(parser: argparse.ArgumentParser) -> None:
    """Score a run on a split, with simple yardsticks beside it; or score anybody's predictions.

    Perplexities compare only under one vocabulary; answers are decoded as the literature's tables are, greedily and in
    at most 30 words, unless a flag says otherwise. What was predicted and measured is kept in RUN/evaluation-SPLIT, or
    in --out FOLDER: give one for each decoding that is to stay. Words of predictions are those of "prediction_tokens"
    and "reference_tokens" (words with spaces between them) where a line has both, else they are found in the texts.

    examples:
      ecore evaluate run
      ecore evaluate run --split valid --limit 500
      ecore evaluate run --method beam --no-repeat-ngram 3 --out run/evaluation-beam
      ecore evaluate run --multi-emotion labels.jsonl      lines of {"conv_id": ..., "emotions": [...]}
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
    parser.add_argument(
        "--multi-emotion",
        type=Path,
        metavar="FILE",
        help="JSON lines of dialogues with several emotions: adds R@1, R@3 and R@5 of the paper's Table 3",
    )
    parser.add_argument("--batch-size", type=int, default=BATCH, metavar="N", help="samples at once")
    parser.add_argument(
        "--precision",
        choices=("float32", "tf32"),
        default="float32",
        help="of matrix products; float32: IEEE, whatever torch is set to; tf32: a GPU's tensor cores multiply "
        "float32 rounded to 10 bits (on a CPU the same as float32) (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples")
    add_decoding(parser)
    add_device(parser)


def run_evaluate(arguments: argparse.Namespace) -> int:
    if (arguments.folder is None) == (arguments.predictions is None):
        raise InputError("evaluate: expected either a run's folder or --predictions FILE")
    options = decoding_options(arguments)
    expect_method(options)
    from ecore.evaluation.predictions import evaluate_file
    from ecore.evaluation.report import evaluate_run, format_file
    from ecore.generation.decoding import Decoding

    if arguments.predictions is not None:
        why = "goes with a run's folder, not with --predictions"
        expect_default(arguments, why, data=None, out=None, limit=None, **dict.fromkeys(options))
        expect_default(arguments, why, split="test", batch_size=BATCH, precision="float32")
        expect_default(arguments, why, checkpoint="best", weights="float32", device="auto", threads=None)
        print(format_file(evaluate_file(arguments.predictions, arguments.multi_emotion)))
        return 0
    where = device(arguments)
    if arguments.precision == "tf32" and where == "cpu":
        print("--precision tf32: on a CPU the same as float32", file=sys.stderr)
    evaluate_run(
        arguments.folder,
        arguments.split,
        arguments.data,
        where,
        arguments.batch_size,
        arguments.out,
        arguments.limit,
        multi_emotion=arguments.multi_emotion,
        precision=arguments.precision,
        decoding=Decoding(**options),
        checkpoint=arguments.checkpoint,
        weights=arguments.weights,
    )
    return 0
