"""The GPT-2 behind a model: from the Hugging Face hub or a folder, and kept in the run's own folder.

A run keeps the tokenizer and GPT-2's configuration in ``RUN/backbone``; GPT-2's weights are in its checkpoints with
all others. So a run with a checkpoint needs neither the hub nor the folder that it was started from.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ecore.config import ModelConfig
from ecore.data.subwords.vocabulary import SubwordVocabulary
from ecore.data.vocabulary import Vocabulary
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.files import check_folder, seal_folder
from ecore.model.gpt2 import GPT2ECore, own_words
from ecore.packages import needed

if TYPE_CHECKING:
    from transformers import GPT2Model

FOLDER = "backbone"


def restore(config: ModelConfig, vocabulary: Vocabulary, tables: WordTables, folder: Path) -> GPT2ECore:
    """The model of a run's or model's folder, its weights still to be loaded.

    Raises:
        InputError: what the folder keeps of the backbone is missing or damaged.
    """
    if not (folder / FOLDER).is_dir():
        raise InputError(
            f"{folder / FOLDER}: no such folder; expected the tokenizer and GPT-2's configuration"
        )
    check_folder(folder / FOLDER)
    return build(config, vocabulary, tables, str(folder / FOLDER), weights=False)


def keep(model: GPT2ECore, folder: Path) -> None:
    """Write what :func:`restore` needs of the backbone, besides weights, into ``folder``."""
    target, temporary = folder / FOLDER, folder / f"{FOLDER}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    model.vocabulary.tokenizer.save_pretrained(temporary)
    model.gpt2.config.save_pretrained(temporary)
    seal_folder(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def expect(source: str) -> None:
    """Check that ``source`` is a GPT-2, without loading its weights.

    Raises:
        InputError: it is not, or cannot be found.
    """
    with _loading(source) as transformers:
        _configuration(source, transformers)


def _configuration(source: str, transformers: ModuleType) -> Any:
    # GPT-2's own classes, never the Auto ones: what a folder names is not imported, and nothing asks to trust it.
    settings, _ = transformers.GPT2Config.get_config_dict(source)
    if not settings:  # of a folder without the file, transformers makes a default model
        raise OSError("no config.json there")
    kind = settings.get("model_type", "gpt2")
    config = transformers.GPT2Config.from_dict(settings) if kind == "gpt2" else None
    if config is None or not config.tie_word_embeddings:
        raise InputError(
            f"{source}: expected a GPT-2 that shares its word embedding with its head, got {kind}"
        )
    return config


@contextlib.contextmanager
def _loading(source: str) -> Iterator[ModuleType]:
    """The package transformers, kept from talking; what goes wrong with ``source`` inside becomes one line."""
    transformers = needed("transformers", "backbone: a pre-trained GPT-2", "'ecore[pretrained]'")
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # else it lists the weights of the head, which GPT-2 shares
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    except (InputError, MemoryError):
        raise
    except Exception as error:  # damaged files raise almost anything
        reason = str(error).strip().split("\n")[0][:300]
        raise InputError(
            f"{source}: cannot be loaded ({reason}); expected a folder that transformers saved, or a model of the "
            "Hugging Face hub"
        ) from None
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def build(
    config: ModelConfig, vocabulary: Vocabulary, tables: WordTables, source: str, weights: bool
) -> GPT2ECore:
    """Make a model around the GPT-2 that ``source`` names.

    Args:
        source: a folder, or a name on the Hugging Face hub.
        weights: load its weights, too; else they are still to be loaded.

    Raises:
        InputError: it cannot be used.
    """
    with _loading(source) as transformers:
        settings = _configuration(source, transformers)
        settings.embd_pdrop = settings.resid_pdrop = config.dropout
        tokenizer = transformers.GPT2TokenizerFast.from_pretrained(source)
        gpt2: GPT2Model
        if weights:
            gpt2 = transformers.GPT2Model.from_pretrained(source, config=settings, dtype=torch.float32)
        else:
            gpt2 = transformers.GPT2Model(settings)
    words = SubwordVocabulary(tokenizer, vocabulary)
    silent = [emotion for emotion, (ids, _) in zip(words.emotions, own_words(words), strict=True) if not ids]
    if silent:
        raise InputError(
            f"{source}: its tokenizer has no token for {silent[0]!r}; expected GPT-2's, with vocab.json and merges.txt"
        )
    return GPT2ECore(config, words, tables, gpt2)
