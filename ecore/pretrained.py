"""A model on disk: configuration, vocabulary and weights in one folder.

``checkpoints.json`` names the weights that count, ``{"best": NAME, "last": NAME}``; the weights of NAME are in
``NAME.safetensors``. It is written last, so a crash never leaves it pointing at a torn file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ecore.baselines import BASELINES
from ecore.baselines.cem import CEM
from ecore.baselines.inferences import Inferences
from ecore.config import ModelConfig, from_dict, to_dict
from ecore.data.emotion_words import word_cooccurrence
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import Vocabulary
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.files import make_folder, read_json, write_json
from ecore.model import backbone
from ecore.model.base import EmpatheticModel
from ecore.model.ecore import ECore
from ecore.model.gpt2 import GPT2ECore
from ecore.model.weights import check_range, load_weights, read_weights, save_weights

FORMAT = 2
_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)
"""Of a checkpoint: no part of it leads out of its folder."""
CONFIG, VOCABULARY, CHECKPOINTS = "config.json", "vocabulary.json", "checkpoints.json"
INFERENCES = "inferences.jsonl"
"""File of a run folder that holds CEM's inferences."""


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a run or model folder.

    Raises:
        InputError: the folder or the file is missing, damaged or of another format.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that `ecore train` wrote")
    if not (folder / CONFIG).exists():
        inside = sorted(
            path.parent for path in folder.glob(f"*/{CHECKPOINTS}") if (path.parent / CONFIG).exists()
        )
        wanted = f"; did you mean {inside[0]}?" if inside else ", which `ecore train` writes"
        raise InputError(f"{folder / CONFIG}: no such file; expected the folder of a run{wanted}")
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


def data_folder(run: Path) -> Path:
    """Return the prepared folder that ``run`` was trained on.

    Raises:
        InputError: ``config.json`` cannot be read, or names none.
    """
    folder = read_config(run)["data"].get("folder")
    if not isinstance(folder, str):
        raise InputError(f"{run / CONFIG}: names no data folder; give the prepared folder yourself (--data)")
    return Path(folder)


def weights_file(folder: Path, which: str) -> Path:
    """The weights that ``checkpoints.json`` names; "best" falls back on "last" where nothing was validated yet.

    Raises:
        InputError: there are none, or ``which`` is unknown.
    """
    if which not in ("best", "last"):
        raise InputError(f"checkpoint: expected best or last, got {which!r}")
    if not (folder / CHECKPOINTS).exists():
        raise InputError(
            f"{folder / CHECKPOINTS}: no such file; the run has no checkpoint yet, or is incomplete"
        )
    names = read_json(folder / CHECKPOINTS)
    name = names.get(which) or names.get("last") if isinstance(names, dict) else None
    if not isinstance(name, str):
        raise InputError(f"{folder / CHECKPOINTS}: names no {which} checkpoint")
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{folder / CHECKPOINTS}: {name[:60]!r}: expected the name of a checkpoint in this folder"
        )
    return folder / f"{name}.safetensors"


def save(
    model: EmpatheticModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a model folder.

    Args:
        dtype: of the weights in the file; None leaves theirs. Loading makes float32 of them.
        notes: what ``config.json`` says of the model's origin besides.

    Raises:
        InputError: no folder can be there, it is a run's, whose settings would be lost, or ``dtype`` cannot hold a
            weight; nothing is written then.
    """
    if (folder / CONFIG).exists() and "training" in read_config(folder):
        raise InputError(f"{folder}: holds a run, whose settings would be lost; expected another folder")
    if dtype is not None:
        check_range(model, dtype)
    make_folder(folder)
    data = {"vocabulary_fingerprint": model.vocabulary.fingerprint}
    config = {"format": FORMAT, "model": to_dict(model.config), "data": data} | (notes or {})
    write_json(folder / CONFIG, config, sealed=True)
    save_parts(model, folder)
    save_weights(model, folder / "checkpoint-final.safetensors", dtype)
    write_json(folder / CHECKPOINTS, {"best": None, "last": "checkpoint-final"}, sealed=True)


def export(run: Path, folder: Path, dtype: torch.dtype, which: str = "best") -> Path:
    """Write one checkpoint of ``run`` to ``folder``, which :func:`load` reads: all that it takes to answer.

    ``config.json`` keeps what the run's says of preset, training and data, but for the data's place on this machine.

    Args:
        folder: new, or empty.
        dtype: float32, bfloat16 or float16, of the weights in the file.
        which: "best" or "last".

    Returns:
        The file of the weights.

    Raises:
        InputError: the run cannot be read, ``folder`` holds something, or ``dtype`` cannot hold a weight.
    """
    model, config = load(run, which), read_config(run)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty; expected a new folder")
    make_folder(folder)
    data = {name: value for name, value in config["data"].items() if name != "folder"}
    notes = {name: config[name] for name in ("preset", "training") if name in config}
    origin = {"checkpoint": weights_file(run, which).stem, "dtype": str(dtype).removeprefix("torch.")}
    save(model, folder, dtype, notes | {"data": data, "exported": origin})
    return weights_file(folder, "last")


def save_parts(model: EmpatheticModel, folder: Path) -> None:
    """Write what ``folder`` needs besides configuration and weights.

    That is the vocabulary, what is kept of a backbone, and CEM's inferences.
    """
    if isinstance(model, GPT2ECore):
        model.vocabulary.words.save(folder / VOCABULARY)
        backbone.keep(model, folder)
    else:
        model.vocabulary.save(folder / VOCABULARY)
    if isinstance(model, CEM):
        model.inferences.save(folder / INFERENCES)


def load(folder: Path, which: str = "best", device: str | torch.device = "cpu") -> EmpatheticModel:
    """Read the model of a run's or model's folder, in eval mode.

    Raises:
        InputError: something in the folder is missing, damaged or does not fit together.
    """
    config = read_config(folder)
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    expected = config["data"].get("vocabulary_fingerprint")
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
    model = _bare(from_dict(ModelConfig, config["model"]), vocabulary, tables, folder)
    load_weights(model, path)
    return model.to(device).eval()


def build(config: ModelConfig, data: PreparedData, run: Path) -> EmpatheticModel:
    """Make the model of a run: with fresh weights or, where the run has a checkpoint, with weights still to be loaded.

    A backbone and inferences come from where ``config`` says; those of a run with a checkpoint from what the run keeps.

    Raises:
        InputError: the backbone or the inferences cannot be used; or ``correlation_prior`` where no emotions' words
            occur together.
    """
    model: EmpatheticModel
    if config.backbone is None and config.model != "cem":
        model = _word_model(config)(config, data.vocabulary, data.tables, data.embeddings)
    elif (run / CHECKPOINTS).exists():
        model = _bare(config, data.vocabulary, data.tables, run)
    elif config.backbone is None:
        if config.inferences is None:
            raise InputError(
                "inferences: model cem needs them; expected --inferences FILE (docs/baselines.md)"
            )
        inferences = Inferences.load(Path(config.inferences))
        model = CEM(config, data.vocabulary, data.tables, data.embeddings, inferences)
    else:
        model = backbone.build(config, data.vocabulary, data.tables, config.backbone, weights=True)
    if config.correlation_prior:
        counts = torch.from_numpy(word_cooccurrence(data.train, data.vocabulary))
        if not counts.any():
            raise InputError(
                f"correlation_prior: no training dialogue of {data.folder} holds words of two emotions (Table 12)"
            )
        model.cooccurrence.copy_(counts)
    return model


def _bare(config: ModelConfig, vocabulary: Vocabulary, tables: WordTables, folder: Path) -> EmpatheticModel:
    """Make a model whose weights are still to be loaded, with the backbone that ``folder`` keeps."""
    if config.model == "cem":
        return CEM(config, vocabulary, tables, inferences=Inferences.load(folder / INFERENCES))
    if config.backbone is None:
        return _word_model(config)(config, vocabulary, tables)
    return backbone.restore(config, vocabulary, tables, folder)


def _word_model(config: ModelConfig) -> type[ECore]:
    """Return the class of a model without a backbone."""
    return BASELINES.get(config.model, ECore)
