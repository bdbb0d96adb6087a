"""One table per question, for this machine's device: ``python -m benchmarks [--out FOLDER] [--data PREPARED]``.

The operators alone take some ten minutes. On a GPU, ``python -m benchmarks.gpu`` also checks the kernels, runs the GPU
tests and the paper's training, and keeps to limits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import generation, operators, otsu, training
from ecore.data.batches import PreparedData
from ecore.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a folder for the results as JSON")
    parser.add_argument(
        "--data", type=Path, metavar="PREPARED", help="batches of a prepared folder, not made-up ones"
    )
    arguments = parser.parse_args()
    if arguments.data:
        try:
            PreparedData.load(arguments.data)
        except InputError as error:
            parser.error(str(error))
    wrong = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for question, benchmark in (
        ("How fast is Otsu's split?", otsu),
        ("How fast are the graph operators?", operators),
        ("How fast is a training step?", training),
        ("How fast is an answer?", generation),
    ):
        print(f"\n# {question} ({device})\n")
        out = (
            ["--out", str(arguments.out / f"{benchmark.__name__.split('.')[1]}-{device}.json")]
            if arguments.out
            else []
        )
        if arguments.data and benchmark in (training, generation):
            out += ["--data", str(arguments.data)]
        try:
            benchmark.main(["--device", device, *out])
        except SystemExit as stopped:
            print(f"left out: it ended with {stopped.code}")
            wrong = wrong or stopped.code not in (None, 0, 2)  # 2: it cannot run here, and has said why
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
