"""A run's weights in bfloat16, in a few files that travel easily, and a run's folder of them again.

    python -m benchmarks.gpu.weights split RUN --out FOLDER
    python -m benchmarks.gpu.weights join FOLDER --out RUN

Each part is a safetensors file of some of the tensors. The parts' metadata have the run's configuration and vocabulary,
so that they are all that is needed. Word tables, which are data and not weights, stay as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.command_line import parser_of
from ecore import pretrained
from ecore.errors import InputError
from ecore.files import parse_json, read_json, write_json
from ecore.model.weights import read_weights
from ecore.pretrained import CHECKPOINTS, CONFIG, VOCABULARY, read_config, weights_file

PART_BYTES, MOST_PARTS = 14 * 10**6, 4
JOINED = "checkpoint-joined"


def packed(sizes: dict[str, int], parts: int) -> list[list[str]]:
    """Names in ``parts`` groups of about the same size: the largest first, each to the smallest group."""
    groups: list[list[str]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        smallest = totals.index(min(totals))
        groups[smallest].append(name)
        totals[smallest] += sizes[name]
    return groups


def split(run: Path, out: Path) -> list[Path]:
    """Write the best weights of a run's folder, or its last ones where nothing was validated, as parts.

    Parts have some 14 MB each; there are four at most, larger ones if need be.

    Raises:
        InputError: there is no run, or no checkpoint.
    """
    config, vocabulary = read_config(run), read_json(run / VOCABULARY)
    path = weights_file(run, "best")
    parameters = dict(pretrained.load(run, "best").named_parameters())
    tensors = {
        name: value.bfloat16() if name in parameters and value.is_floating_point() else value
        for name, value in read_weights(path).items()
    }
    sizes = {name: value.nbytes for name, value in tensors.items()}
    number = min(MOST_PARTS, max(1, -(-sum(sizes.values()) // PART_BYTES)))
    parts = []
    for index, names in enumerate(packed(sizes, number), 1):
        metadata = {"checkpoint": path.stem, "part": str(index), "parts": str(number)}
        metadata |= {"config": json.dumps(config)}
        if index == 1:
            metadata["vocabulary"] = json.dumps(vocabulary, ensure_ascii=False)
        parts.append(out / f"weights-{index}.safetensors")
        save_file({name: tensors[name] for name in names}, parts[-1], metadata)
    return parts


def join(folder: Path, run: Path) -> None:
    """Make a run's folder, of float32 weights, of the parts in ``folder``.

    Raises:
        InputError: a part is missing or damaged or belongs to other weights, or ``run`` exists.
    """
    if run.exists():
        raise InputError(f"{run}: exists; expected the name of a new folder")
    tensors: dict[str, Tensor] = {}
    found: dict[int, dict[str, str]] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        try:
            with safe_open(path, "pt") as part:
                metadata = dict(part.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from None
        if not {"part", "parts", "config", "checkpoint"} <= metadata.keys():
            raise InputError(f"{path}: not a part that --keep-weights wrote")
        found[int(metadata["part"])] = metadata
        tensors |= read_weights(path)
    if not found:
        raise InputError(f"{folder}: no weights-*.safetensors in it")
    (number, *others) = {int(metadata["parts"]) for metadata in found.values()}
    sources = {(metadata["config"], metadata["checkpoint"]) for metadata in found.values()}
    if others or len(sources) > 1:
        raise InputError(f"{folder}: parts of different weights")
    missing = sorted(set(range(1, number + 1)) - set(found))
    if missing:
        raise InputError(f"{folder}: part {missing[0]} of {number} is missing")
    floats = {
        name: value.float() if value.dtype == torch.bfloat16 else value for name, value in tensors.items()
    }
    run.mkdir(parents=True)
    write_json(run / CONFIG, parse_json(found[1]["config"], f"{folder}: config"))
    write_json(run / VOCABULARY, parse_json(found[1]["vocabulary"], f"{folder}: vocabulary"))
    save_file(floats, run / f"{JOINED}.safetensors")
    write_json(run / CHECKPOINTS, {"best": None, "last": JOINED})


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.gpu.weights", __doc__)
    parser.add_argument("command", choices=("split", "join"))
    parser.add_argument("folder", type=Path, help="a run's folder to split, or a folder of parts to join")
    parser.add_argument("--out", type=Path, required=True, help="where the parts, or the new run, go")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "split":
            for part in split(arguments.folder, arguments.out):
                print(f"{part}: {part.stat().st_size / 1e6:.1f} MB")
        else:
            join(arguments.folder, arguments.out)
            print(f"next: ecore evaluate {arguments.out}   or   ecore chat {arguments.out}")
    except InputError as error:
        print(f"weights: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
