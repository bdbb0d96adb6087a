"""A run's folder: its settings, and checks that training may start or resume there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecore.config import ModelConfig, TrainingConfig, from_dict, to_dict
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import Vocabulary
from ecore.errors import InputError
from ecore.files import check_writable, locked, write_json
from ecore.pretrained import CHECKPOINTS, CONFIG, FORMAT, VOCABULARY, read_config, weights_file
from ecore.training.checkpoint import stray_files
from ecore.training.journal import read_metrics


@dataclass(frozen=True)
class Settings:
    """The content of ``config.json``."""

    model: ModelConfig
    training: TrainingConfig
    data: dict[str, Any]
    preset: str | None = None

    def write(self, run: Path) -> None:
        """Write ``config.json``, atomically."""
        value = {"format": FORMAT, "preset": self.preset, "model": to_dict(self.model)}
        write_json(run / CONFIG, value | {"training": to_dict(self.training), "data": self.data}, sealed=True)


def read_settings(run: Path) -> Settings:
    """Return the settings of an existing run.

    Raises:
        InputError: the folder holds no run, or one whose ``config.json`` cannot be used.
    """
    value = read_config(run)
    try:
        model, training = from_dict(ModelConfig, value["model"]), from_dict(TrainingConfig, value["training"])
        if training.precision == "auto":
            raise InputError("precision: expected the one that was found, got 'auto'")
        preset = value.get("preset")
        if not isinstance(preset, str | None):
            raise InputError(f"preset: expected a name, got {repr(preset)[:40]}")
        return Settings(model, training, dict(value["data"]), preset)
    except InputError as error:
        raise InputError(f"{run / CONFIG}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run / CONFIG}: not a run's settings ({error!r})") from None


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Be the only one that trains in ``run``, which is made where it is missing; it goes again if it stays empty.

    Raises:
        InputError: another process trains there, or no folder can be there.
    """
    made = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "a file is in the way" if run.exists() else f"cannot be made a folder ({error.strerror})"
        raise InputError(f"{run}: {what}; expected a new folder for the run") from None
    try:
        with locked(run, "another process trains there; wait for it, or stop it"):
            check_writable(run)
            yield
    finally:
        if made:
            with suppress(OSError):
                run.rmdir()


def expect_new(run: Path) -> None:
    """Check that a new run may be made at ``run``.

    Raises:
        InputError: something is there already.
    """
    if set(run.iterdir()) - set(stray_files(run)):
        raise InputError(f"{run}: exists and is not empty; go on with --resume or choose another folder")


def start(run: Path, data: PreparedData, settings: Settings) -> None:
    """Make the folder of a new run."""
    # First, so that a process that dies right after leaves a run that can be resumed.
    settings.write(run)
    data.vocabulary.save(run / VOCABULARY)


def resume(run: Path, data: PreparedData, max_steps: int | None) -> Settings:
    """Return the settings of the run to resume, its end moved to ``max_steps`` where that is given.

    Raises:
        InputError: no run is there, or it was trained on other data.
    """
    settings = read_settings(run)
    new = describe(data)
    for key, name in (("vocabulary_fingerprint", "vocabulary"), ("fingerprint", "data")):
        if settings.data.get(key) != new[key]:
            raise InputError(
                f"{data.folder}: not the {name} that {run} was trained on "
                f"(fingerprint {new[key]}, expected {settings.data.get(key)})"
            )
    if not (run / VOCABULARY).exists():  # the run died between its first two files
        data.vocabulary.save(run / VOCABULARY)
    elif Vocabulary.load(run / VOCABULARY).fingerprint != data.vocabulary.fingerprint:
        raise InputError(f"{run / VOCABULARY}: not the vocabulary that the run was trained with")
    if max_steps is not None:
        training = dataclasses.replace(settings.training, max_steps=max_steps)
        settings = dataclasses.replace(settings, training=training)
    return settings


def describe(data: PreparedData) -> dict[str, Any]:
    """Return what ``config.json`` says of the data."""
    names = ("fingerprint", "vocabulary", "vocabulary_fingerprint", "vocabulary_size", "intensity", "glove")
    return {"folder": os.path.realpath(data.folder)} | {key: data.meta[key] for key in names}


def summarize(run: Path) -> str:
    """Describe a run and how far it came, for people.

    Raises:
        InputError: there is no run, or its files cannot be used.
    """
    settings = read_settings(run)
    model, lines = settings.model, read_metrics(run)
    folder = settings.data.get("folder") or "of another machine"
    left_out = f", without {', '.join(model.ablations)}" if model.ablations else ""
    shown = [
        f"run {run}: preset {settings.preset or 'none'}, {model.title}{left_out}",
        f"data {folder}: {_number(settings.data.get('vocabulary_size'), ',')} words of the "
        f"{settings.data.get('vocabulary')} vocabulary, intensities of {settings.data.get('intensity')}",
    ]
    if lines:
        last = lines[-1]
        shown.append(
            f"logged up to step {last['step']:,} of {settings.training.max_steps:,}: loss "
            f"{_number(last.get('loss'), '.3f')}"
        )
    validated = [line for line in lines if line.get("valid_ppl_per_sample") is not None]
    if validated:
        best = min(validated, key=lambda line: line["valid_ppl_per_sample"])
        accuracy = best.get("valid_emotion_accuracy")
        shown.append(
            f"best validation at step {best['step']:,}: perplexity {_number(best.get('valid_ppl'), '.2f')} per token, "
            f"{best['valid_ppl_per_sample']:.2f} per sample"
            + ("" if accuracy is None else f", emotion accuracy {accuracy:.2f} %")
        )
    if (run / CHECKPOINTS).exists():
        names = [f"{which}: {weights_file(run, which).name}" for which in ("best", "last")]
        shown.append(f"checkpoints: {', '.join(names)}")
    else:
        shown.append("no checkpoint yet")
    return "\n".join(shown)


def _number(value: Any, form: str) -> str:
    """Return ``value`` in the format ``form``; a file that was edited may lack it."""
    return format(value, form) if isinstance(value, int | float) else "unknown"
