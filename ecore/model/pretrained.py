"""A model on disk: configuration, vocabulary and weights in one folder.

``checkpoints.json`` names the weights that count, ``{"best": NAME, "last": NAME}``; the weights of NAME are in
``NAME.safetensors``. It is written last, so a crash never leaves it pointing at a torn file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ecore.config import ModelConfig, from_dict, to_dict
from ecore.data.batches import WordTables
from ecore.data.vocabulary import Vocabulary
from ecore.errors import InputError
from ecore.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from ecore.model.ecore import ECore

FORMAT = 2
CONFIG, VOCABULARY, CHECKPOINTS = "config.json", "vocabulary.json", "checkpoints.json"


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a run or model folder.

    Raises:
        InputError: the folder or the file is missing, damaged or of another format.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that `ecore train` wrote")
    config = read_json(folder / CONFIG)
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT:
        older = ": of format 1, whose weights would perceive other emotions now; train again"
        raise InputError(
            f"{folder / CONFIG}: not an E-CORE configuration of format {FORMAT}{older if version == 1 else ''}"
        )
    for name in ("model", "data"):
        if not isinstance(config.get(name), dict):
            raise InputError(f"{folder / CONFIG}: damaged: no {name!r} in it")
    return config


def weights_file(folder: Path, which: str) -> Path:
    """The weights that ``checkpoints.json`` names; "best" falls back on "last" where nothing was validated yet.

    Raises:
        InputError: there are none, or ``which`` is unknown.
    """
    if which not in ("best", "last"):
        raise InputError(f"checkpoint: expected best or last, got {which!r}")
    names = read_json(folder / CHECKPOINTS)
    name = names.get(which) or names.get("last") if isinstance(names, dict) else None
    if not isinstance(name, str):
        raise InputError(f"{folder / CHECKPOINTS}: names no {which} checkpoint")
    return folder / f"{name}.safetensors"


def save_weights(model: ECore, path: Path) -> None:
    """Write every weight and word table to ``path``, atomically. Tied weights are written once."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["output.weight"]
    with atomic_path(path) as temporary:
        save_file(state, temporary)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` file.

    Raises:
        InputError: missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def load_weights(model: ECore, path: Path) -> None:
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


def save(model: ECore, folder: Path) -> None:
    """Write a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"vocabulary_fingerprint": model.vocabulary.fingerprint}
    write_json(folder / CONFIG, {"format": FORMAT, "model": to_dict(model.config), "data": data})
    model.save_parts(folder)
    save_weights(model, folder / "checkpoint-final.safetensors")
    write_json(folder / CHECKPOINTS, {"best": None, "last": "checkpoint-final"})


def load(cls: type[ECore], folder: Path, which: str) -> ECore:
    """Read a model folder, on CPU."""
    told = read_config(folder)
    config = from_dict(ModelConfig, told["model"])
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    expected = told["data"].get("vocabulary_fingerprint")
    if vocabulary.fingerprint != expected:
        raise InputError(
            f"{folder / VOCABULARY}: of another model: {vocabulary.fingerprint}, expected {expected}"
        )
    path = weights_file(folder, which)
    state = read_weights(path)
    missing = [name for name in WordTables._fields if name not in state]
    if missing:
        raise InputError(f"{path}: does not hold an E-CORE model: no {missing[0]}")
    if len(state["intensity"]) != len(vocabulary):
        raise InputError(
            f"{path}: of another vocabulary: {len(state['intensity'])} words, expected the {len(vocabulary)} of "
            f"{folder / VOCABULARY}"
        )
    tables = WordTables(*(state[name] for name in WordTables._fields))
    if config.backbone is None:
        model = cls(config, vocabulary, tables)
    else:
        from ecore.backbone import restore  # it needs transformers

        model = restore(config, vocabulary, tables, folder)
    load_weights(model, path)
    return model
