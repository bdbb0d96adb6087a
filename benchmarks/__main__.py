"""One table per question, for this machine's device: ``python -m benchmarks [--out FOLDER] [--data PREPARED]``.

The operators alone take some ten minutes. On a GPU, ``python -m benchmarks.gpu`` also checks the kernels, runs the GPU
tests and the paper's training, and keeps to limits. What fails, or is left out because a package or a file is
missing, is named at the end, exit code 1. ``python -m benchmarks compare BASE`` measures two commits side by side.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from ecore.data.prepared import PreparedData
from ecore.errors import InputError

QUESTIONS = {
    "otsu": "How fast is Otsu's split?",
    "operators": "How fast are the graph operators?",
    "step_operators": "How fast are the parts of a step?",
    "training": "How fast is a training step?",
    "generation": "How fast is an answer?",
}
"""The question that each benchmark answers, by its name."""


def main(argv: Sequence[str] | None = None) -> int | None:
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] == "compare":
        return harness.command("benchmarks.compare")(given[1:])
    parser = parser_of("benchmarks", __doc__)
    parser.add_argument("--out", type=Path, help="a folder for the results as JSON")
    parser.add_argument(
        "--data", type=Path, metavar="PREPARED", help="batches of a prepared folder, not made-up ones"
    )
    arguments = parser.parse_args(given)
    if arguments.data:
        try:
            PreparedData.load(arguments.data)
        except InputError as error:
            parser.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failures: dict[str, str] = {}
    for name, question in QUESTIONS.items():
        print(f"\n# {question} ({device})\n")
        out = ["--out", str(arguments.out / f"{name}-{device}.json")] if arguments.out else []
        if arguments.data and name in ("training", "generation"):
            out += ["--data", str(arguments.data)]
        try:
            harness.command(f"benchmarks.{name}")(["--device", device, *out])
        except SystemExit as stopped:
            if stopped.code not in (None, 0):
                failures[name] = f"it ended with {stopped.code}"
        except Exception as error:  # the others are still measured
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    print()
    harness.fail_for(failures)
    return None


if __name__ == "__main__":
    raise SystemExit(main())
