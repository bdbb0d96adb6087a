"""The tensors of a model in a safetensors file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ecore.errors import InputError
from ecore.files import atomic_path
from ecore.model.base import EmpatheticModel

_MOVED = {
    "correlation.": "perceiver.correlation.",
    "graph.": "perceiver.graph_network.",
    "perceptron.": "perceiver.perceptron.",
}
"""How names of weights begin in older files, and now."""


def present_name(name: str) -> str:
    """Return the name that a weight of an older file has now."""
    for old, new in _MOVED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def save_weights(model: EmpatheticModel, path: Path) -> None:
    """Write every weight and word table to ``path``, atomically. Tied weights are written once."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["output.weight"]
    with atomic_path(path) as temporary:
        save_file(state, temporary)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a ``.safetensors`` file, by the names that they have now.

    Raises:
        InputError: missing or damaged.
    """
    try:
        return {present_name(name): value for name, value in load_file(path).items()}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def load_weights(model: EmpatheticModel, path: Path) -> None:
    """Fill ``model`` from :func:`save_weights`'s file.

    Raises:
        InputError: missing, damaged, or of a model of other shapes.
    """
    state = read_weights(path)
    if model.config.tie_embeddings and "embedding.word.weight" in state:
        state["output.weight"] = state["embedding.word.weight"]
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for name in [*expected, *state]:
        if name not in state or name not in expected or state[name].shape != expected[name]:
            found = list(state[name].shape) if name in state else "nothing"
            wanted = list(expected[name]) if name in expected else "nothing"
            raise InputError(f"{path}: does not fit this model: {name}: expected {wanted}, got {found}")
    model.load_state_dict(state)
