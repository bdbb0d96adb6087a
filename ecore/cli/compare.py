"""``ecore compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecore.errors import InputError


def declare_compare(parser: argparse.ArgumentParser) -> None:
    """Compare two models on the same samples, with 95 % intervals of a paired bootstrap over the samples.

    An interval without 0 says that another draw of test samples would hardly turn the difference around. It says
    nothing of other seeds: `ecore reproduce --seeds` does.

    examples:
      ecore compare paper/runs/none-seed0 paper/runs/soft-seed0
      ecore compare first/predictions.jsonl second/predictions.jsonl --resamples 2000
    """
    places = "a run that `ecore evaluate` has scored, a folder of its evaluation, or a predictions file"
    parser.add_argument("first", type=Path, metavar="FIRST", help=places)
    parser.add_argument("second", type=Path, metavar="SECOND", help="likewise, of the same samples")
    parser.add_argument("--resamples", type=int, default=10_000, metavar="N", help="draws of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws")


def run_compare(arguments: argparse.Namespace) -> int:
    """Print a line for each metric."""
    for name, value, least in (("resamples", arguments.resamples, 100), ("seed", arguments.seed, 0)):
        if value < least:
            raise InputError(f"--{name}: expected at least {least}, got {value}")
    if arguments.seed >= 2**32:  # NumPy's
        raise InputError(f"--seed: expected a number in [0, 2^32), got {arguments.seed}")
    from ecore.evaluation import comparison

    files = [comparison.predictions_of(path) for path in (arguments.first, arguments.second)]
    first, second = comparison.paired_records(*files)
    rows = comparison.compare(first, second, arguments.resamples, arguments.seed)
    print(
        f"first:  {files[0]}\nsecond: {files[1]}\n{len(first):,} samples, {arguments.resamples:,} resamples\n"
    )
    print(f"{'':16}{'first':>10}{'second':>10}{'second - first':>16}   95 % interval")
    for row in rows:
        print(
            f"{row.metric:16}{row.first:10.2f}{row.second:10.2f}{row.second - row.first:+16.2f}"
            f"   {row.low:+.2f} to {row.high:+.2f}"
        )
    return 0
