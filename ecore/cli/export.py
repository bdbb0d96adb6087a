"""``ecore export``."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def declare_export(parser: argparse.ArgumentParser) -> None:
    """Write a run's model to a folder of its own: weights, vocabulary and settings, and nothing else.

    The folder is what `ecore chat`, `ecore generate`, `ecore evaluate --data PREPARED` and ECore.from_pretrained read.
    bfloat16 and float16 halve the file; loading makes float32 of the weights, so answers take as long as the run's.
    Weights are in safetensors, every file has a checksum, and the path of the training data is left out.

    examples:
      ecore export run --out model
      ecore export run --dtype bfloat16 --out model-bf16
      ecore export run --checkpoint last --out model-last
    """
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder made by `ecore train`")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights in the file")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which weights")


def run_export(arguments: argparse.Namespace) -> int:
    import torch

    from ecore import pretrained

    dtype = getattr(torch, arguments.dtype)
    weights = pretrained.export(arguments.folder, arguments.out, dtype, arguments.checkpoint)
    print(
        f"{arguments.out}: {arguments.dtype} weights, {weights.stat().st_size / 2**20:,.1f} MiB; "
        f"talk with it: ecore chat {arguments.out}"
    )
    return 0
