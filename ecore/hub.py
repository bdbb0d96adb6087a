"""Models on the Hugging Face hub: the files of a model folder, and a card that describes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ecore.errors import InputError
from ecore.files import read_json
from ecore.packages import needed

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
FILES = (
    "config.json",
    "vocabulary.json",
    "checkpoints.json",
    "*.safetensors",
    "backbone/*",
    "inferences.jsonl",
)
"""All that is loaded of a repository: no code, nothing pickled."""
_OPTIMISER = "*.state.safetensors"
SCORES = ("ppl_per_sample", "accuracy", "dist_1", "dist_2")
"""Of an evaluation, those that a card shows."""


def is_name(name: str) -> bool:
    """Tell whether ``name`` is a repository's, ``user/name``."""
    return _NAME.fullmatch(name) is not None


def download(name: str, revision: str | None = None) -> Path:
    """Return a folder with the model of a repository; from the hub's cache where it is there already or offline.

    Raises:
        InputError: there is no such repository, or it cannot be reached.
    """
    hub = needed("huggingface_hub", "a model from the Hugging Face hub", "'ecore[hub]'")
    # Its base is the HTTP client's error, which a connection that fails raises.
    try:
        folder = hub.snapshot_download(
            name, revision=revision, allow_patterns=list(FILES), ignore_patterns=[_OPTIMISER]
        )
    except (OSError, ValueError, hub.errors.HfHubHTTPError.__mro__[1]) as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"{name}: no such folder, and not to be had from the Hugging Face hub ({why})"
        ) from None
    return Path(folder)


def upload(folder: Path, name: str, private: bool) -> str:
    """Put a model folder, with its card in ``README.md``, on the hub, and return its address.

    Raises:
        InputError: the hub refuses it or cannot be reached.
    """
    if not is_name(name):
        raise InputError(f"push_to_hub: expected a repository's name as user/name, got {name[:60]!r}")
    hub = needed("huggingface_hub", "a model for the Hugging Face hub", "'ecore[hub]'")
    try:
        api = hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            allow_patterns=[*FILES, "README.md"],
            commit_message="Upload an E-CORE model",
        )
    except (OSError, ValueError, hub.errors.HfHubHTTPError.__mro__[1]) as error:
        raise InputError(
            f"{name}: the Hugging Face hub did not take it ({' '.join(str(error).split())[:300]})"
        ) from None
    return str(address)


def _introduction(config: Any) -> tuple[str, str]:
    """Return a model card's title and first words."""
    paper = "(Fu et al., EMNLP 2023, arXiv 2311.15016)"
    if config.model != "ecore":
        return (
            f"# An empathetic dialogue model: {config.model}",
            f"One of the systems that the paper of E-CORE {paper} compares with, on the encoder, decoder and training "
            "of the package `ecore`; its documentation says what differs from its authors' (docs/baselines.md).",
        )
    return (
        "# An E-CORE model",
        f"Empathetic dialogue over a multi-resolution emotion graph {paper}, as the package `ecore` implements it. It "
        "reads a dialogue, perceives its emotions, and answers.",
    )


def card(config: Any, source: Path | None) -> str:
    """Return a model card: what the model is, what it was trained on, how it scores, and its limits.

    Args:
        config: the model's :class:`ecore.config.ModelConfig`.
        source: the run that it comes from, whose data and scores it names where they are there.
    """
    data = _member(source, "config.json", "data")
    metrics = _metrics(source)
    sections = [
        "---\nlibrary_name: ecore\npipeline_tag: text-generation\ntags:\n- empathetic-dialogue\n- emotion\n---",
        *_introduction(config),
        '```python\nfrom ecore import ECore\n\nmodel = ECore.from_pretrained("USER/NAME")\n'
        'print(model.respond("My dog died."))\n```',
        f"Strategy {config.strategy}, dimension {config.dim}, {config.encoder_blocks} encoder and "
        f"{config.decoder_blocks} decoder blocks, backbone {config.backbone or 'none'}, ablations "
        f"{', '.join(config.ablations) or 'none'}.",
        "## Data",
        f"Vocabulary of {data.get('vocabulary_size', '?')} words ({data.get('vocabulary', '?')}), intensities from "
        f"{data.get('intensity', '?')}, fingerprint of the prepared data `{data.get('fingerprint', '?')}`."
        if data
        else "Not known: it was not saved from a run.",
        "The licence of the weights follows from that of the training data, which the uploader has to name here: "
        "EmpatheticDialogues, for instance, is CC BY-NC 4.0.",
        "## Scores on the test split",
        "\n".join(
            [
                "| score | |",
                "| --- | ---: |",
                *(f"| {name} | {value:.2f} |" for name, value in metrics.items()),
            ]
        )
        if metrics
        else "Not evaluated.",
        "## Limits",
        "A research model. It answers in general terms, may be wrong about emotions and unkind, knows no facts, and "
        "gives no advice: it is no help in a crisis.",
    ]
    return "\n\n".join(sections) + "\n"


def _metrics(source: Path | None) -> dict[str, float]:
    found = _member(source, "evaluation-test/metrics.json", None)
    return {name: float(found[name]) for name in SCORES if isinstance(found.get(name), int | float)}


def _member(source: Path | None, file: str, name: str | None) -> dict[str, Any]:
    """Return an object of a run's file; empty where it is not there."""
    if source is None or not (source / file).is_file():
        return {}
    value = read_json(source / file)
    value = value.get(name) if name is not None and isinstance(value, dict) else value
    return value if isinstance(value, dict) else {}
