"""Flags that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ecore.config import PAPER_GRAPH, ModelConfig, add_arguments, overrides
from ecore.errors import InputError
from ecore.ranges import check_value


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    from ecore.generation.decoding import Decoding

    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which weights")
    add_arguments(parser.add_argument_group("decoding"), Decoding)


def decoding_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of Decoding that the command line gave."""
    from ecore.generation.decoding import Decoding

    options = overrides(arguments, Decoding)
    Decoding(**options)  # what is out of range should be said before a model is loaded
    return options


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
