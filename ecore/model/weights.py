"""The tensors of a model in a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.files import atomic_path
from ecore.model.base import EmpatheticModel

_HASH = "sha256"
_MOVED = {
    "correlation.": "perceiver.correlation.",
    "graph.": "perceiver.graph_network.",
    "perceptron.": "perceiver.perceptron.",
}
"""Beginnings of the names of weights in older files, and now."""


def present_name(name: str) -> str:
    """Return the name that a weight of an older file, or its part of the optimiser's state, has now."""
    if name.startswith("adam."):
        adam, part, weight = name.split(".", 2)
        return f"{adam}.{part}.{present_name(weight)}"
    for old, new in _MOVED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def save_weights(model: EmpatheticModel, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write every weight and word table to ``path``, atomically. Tied weights are written once.

    Args:
        dtype: of the weights in the file; None leaves theirs. Word tables keep their own: a rounded intensity could
            fall on the other side of a threshold.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["output.weight"]
    if dtype is not None:
        state |= {name: state[name].to(dtype) for name in _weights(state)}
    save_tensors(path, state, {})


def check_range(model: EmpatheticModel, dtype: torch.dtype) -> None:
    """Check that ``dtype`` can hold every weight of ``model``.

    Raises:
        InputError: one is beyond its largest number, or it has none with fractions.
    """
    if not dtype.is_floating_point:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(f"dtype: expected float32, bfloat16 or float16, got {kind}")
    state = model.state_dict()
    most = torch.finfo(dtype).max
    for name in _weights(state):
        largest = float(state[name].detach().abs().max()) if state[name].numel() else 0.0
        if largest > most:
            kind = str(dtype).removeprefix("torch.")
            raise InputError(
                f"{name}: its largest weight is {largest:.3g}, {kind} holds {most:.3g} at most; "
                "expected bfloat16 or float32"
            )


def _weights(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the trained weights of a state: all floating tensors but word tables."""
    return [
        name for name, value in state.items() if value.is_floating_point() and name not in WordTables._fields
    ]


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> None:
    """Write contiguous ``tensors`` on the CPU and ``notes`` to a ``.safetensors`` file, atomically, with their hash.

    Raises:
        OSError: the disk refuses.
    """
    try:
        with atomic_path(path) as temporary:
            save_file(dict(tensors), temporary, metadata={**notes, _HASH: _digest(tensors, notes)})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a ``.safetensors`` file: its tensors, by the names that they have now, and its notes.

    Both have to fit the file's hash, where it has one.

    Raises:
        InputError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {present_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged headers raise torch's errors, too
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: damaged, not a readable safetensors file ({reason})") from None
    expected = notes.pop(_HASH, None)  # older files have none
    if expected is not None and expected != _digest(tensors, notes):
        raise InputError(f"{path}: damaged: its tensors do not fit their hash")
    return tensors, notes


def _digest(tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(notes.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count_weights(path: Path) -> int:
    """Return how many trained weights a ``.safetensors`` file of a model holds; tied ones count once.

    Raises:
        InputError: missing or damaged.
    """
    state, _ = read_tensors(path)
    return sum(state[name].numel() for name in _weights(state))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a ``.safetensors`` file, by the names that they have now.

    Raises:
        InputError: missing or damaged, or a weight is not finite.
    """
    state, _ = read_tensors(path)
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{path}: {name}: a weight is not finite; expected finite ones")
    return state


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
