"""One table per question, for this machine's device: ``python -m benchmarks [--out FOLDER]``.

On a GPU, ``python -m benchmarks.gpu`` also runs the GPU tests and keeps to nine minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import operators, otsu


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a folder for the results as JSON")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for question, benchmark in (
        ("How fast is Otsu's split?", otsu),
        ("How fast are the graph operators?", operators),
    ):
        print(f"\n# {question} ({device})\n")
        out = (
            ["--out", str(arguments.out / f"{benchmark.__name__.split('.')[1]}-{device}.json")]
            if arguments.out
            else []
        )
        try:
            benchmark.main(["--device", device, *out])
        except SystemExit as stopped:  # it has said why
            print(f"left out: it ended with {stopped.code}")


if __name__ == "__main__":
    main()
