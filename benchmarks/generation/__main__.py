"""Generation: what a word costs, what each improvement is worth, where the time goes, how it grows.

``python -m benchmarks.generation [--data PREPARED] [--preset released] [--device cpu] [--out FILE.json]``

``--weights RUN`` compares a trained run's greedy answers with int8 and bfloat16 weights to float32's instead: words a
second at one context, and how many answers and words are the same.

``--plot FILE.svg`` draws how it grows; ``--from FILE.json ... --plot FILE.svg`` what was kept, without measuring.

Weights are random and EOS is ruled out, so that every answer has 30 words, encoding included.
Configurations run in turn on the same contexts: with ``--data`` those of the test split, in batches of similar
length about the mean as `ecore evaluate` makes them, else made up in the same sizes. A configuration whose logits are
not those of whole responses is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from benchmarks.generation import runner, weights
from benchmarks.generation.report import plot, report
from ecore.config import PRESETS
from ecore.errors import InputError
from ecore.files import read_json


def parser() -> argparse.ArgumentParser:
    parser = parser_of("benchmarks.generation", __doc__)
    parser.add_argument("--data", type=Path, metavar="PREPARED", help="a folder made by `ecore prepare`")
    parser.add_argument("--preset", choices=list(PRESETS), default="released")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (default: 2)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--weights", type=Path, metavar="RUN", help="compare this run's answers by weights")
    parser.add_argument(
        "--contexts",
        type=int,
        default=500,
        metavar="N",
        help="with --weights: answers compared (default: 500)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw how it grows, as .svg or .png")
    parser.add_argument(
        "--from",
        dest="kept",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="draw kept results, up to three presets",
    )
    return parser


def kept_results(path: Path) -> list[dict[str, Any]]:
    """Return the results that ``--out`` wrote.

    Raises:
        InputError: the file is missing or holds something else.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("benchmark") != "generation":
        raise InputError(f"--from: {path}: expected results that this benchmark wrote with --out")
    return document["results"]


def draw_kept(files: Sequence[Path], image: Path | None) -> None:
    """Draw the results in these files together.

    Raises:
        InputError: no image is named, a file holds something else, or there are too many results.
    """
    if image is None:
        raise InputError("--from: expected --plot with it")
    results = [result for file in files for result in kept_results(file)]
    try:
        plot(results, image)
    except ValueError as error:
        raise InputError(f"--from: {error}") from None


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all measurements.

    Raises:
        InputError: an argument cannot be used.
    """
    if arguments.rounds < 2:
        raise InputError(f"--rounds: expected at least 2, got {arguments.rounds}")
    if arguments.contexts < weights.TIMED:
        raise InputError(f"--contexts: expected at least {weights.TIMED}, got {arguments.contexts}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here")
    torch.set_num_threads(arguments.threads)
    if arguments.weights is not None:
        return weights.compare(arguments.weights, arguments.data, arguments.contexts, arguments.rounds)
    return runner.run(arguments.data, arguments.preset, arguments.device, arguments.rounds, arguments.compile)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables and write the file."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    try:
        if arguments.kept:
            draw_kept(arguments.kept, arguments.plot)
            return
        result = measured(arguments)
    except InputError as error:
        command_line.error(str(error))
    if arguments.weights is not None:
        print(weights.report(result))
        if arguments.out:
            harness.write_json(arguments.out, "generation-weights", [result])
        return
    print(f"{arguments.preset}, {arguments.device}, {result['contexts']}\n")
    print(report(result, runner.WORDS_EACH))
    if arguments.out:
        harness.write_json(arguments.out, "generation", [result])
    if arguments.plot:
        plot([result], arguments.plot)


if __name__ == "__main__":
    main()
