"""Flags that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecore.config import PAPER_GRAPH, WEIGHTS, ModelConfig, add_arguments, overrides
from ecore.errors import InputError
from ecore.ranges import check_value

if TYPE_CHECKING:
    from ecore.pipeline import ECore

SHOWN_EMOTIONS = 3
BATCH = 64
"""Samples of a split that are answered at once."""


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    from ecore.generation.decoding import Decoding

    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which weights")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="float32",
        help="what answers are generated with; int8 and bfloat16 are for CPUs, where a word takes as long as reading "
        "the weights (default: %(default)s)",
    )
    add_arguments(parser.add_argument_group("decoding"), Decoding)


def check_graph_form(config: ModelConfig, given: Mapping[str, Any]) -> None:
    """Refuse flags that the graph form has no use for."""
    if config.released:
        for name in [name for name in PAPER_GRAPH if name in given]:
            raise InputError(
                f"--{name.replace('_', '-')}: of no use with graph form released, which has its own; "
                "expected --graph-form paper"
            )


def device(arguments: argparse.Namespace) -> str:
    import torch

    if arguments.threads is not None:
        try:
            check_value("threads", arguments.threads, int)
        except InputError as error:
            raise InputError(f"--{error}") from None
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; `ecore info` says why")
    if arguments.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(arguments.device)


def expect_default(arguments: argparse.Namespace, why: str, **defaults: Any) -> None:
    """Refuse flags that would change nothing.

    Args:
        why: with what they go, for the message.
        **defaults: of each flag, by its name in ``arguments``.

    Raises:
        InputError: one has another value.
    """
    for name, default in defaults.items():
        if getattr(arguments, name) != default:
            raise InputError(f"--{name.replace('_', '-')}: {why}")


def expect_method(options: Mapping[str, Any]) -> None:
    """Refuse a beam search's settings where all answers are found otherwise.

    A server's requests and a chat's ``/method`` may still ask for beams; commands that answer once cannot.

    Raises:
        InputError: there are such settings.
    """
    method = options.get("method", "greedy")
    for name in [name for name in ("beams", "length_penalty") if name in options and method != "beam"]:
        raise InputError(f"--{name.replace('_', '-')}: only for --method beam, the method is {method!r}")


def add_answering(parser: argparse.ArgumentParser) -> None:
    """Declare which model answers and how."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder made by `ecore train`")
    add_decoding(parser)
    add_device(parser)


def decoding_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the decoding's settings that were given.

    Raises:
        InputError: one is out of range, which should be said before a model is loaded.
    """
    from ecore.generation.decoding import Decoding

    options = overrides(arguments, Decoding)
    Decoding(**options)
    return options


def load(arguments: argparse.Namespace) -> ECore:
    """Return the model that the flags of :func:`add_answering` name."""
    from ecore.pipeline import ECore

    model = ECore.from_pretrained(arguments.folder, arguments.checkpoint, device(arguments))
    try:
        return model.quantize(arguments.weights)
    except InputError as error:
        raise InputError(f"--{error}") from None


def files_of_run(folder: Path) -> list[Path]:
    """Return the files that a run or a model consists of; what else lies in its folder is the user's."""
    names = ("config.json", "vocabulary.json", "checkpoints.json", "metrics.jsonl", "inferences.jsonl")
    return [*(folder / name for name in names), *folder.glob("*.safetensors")]


def shown(emotions: Sequence[tuple[str, float]], count: int = SHOWN_EMOTIONS) -> str:
    """Return the strongest emotions in a line."""
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in emotions[:count])
