"""Every setting of a model and its training, as frozen dataclasses: one source for CLI, Python, checkpoint.

A field's ``help`` and ``choices`` metadata become its command-line flag (:func:`add_arguments`); the
dataclass as a dictionary is what ``config.json`` holds (:func:`to_dict`, :func:`from_dict`).
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ecore.errors import InputError
from ecore.ranges import check

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ABLATIONS = ("graph", "co-p", "co-g", "co-loss", "gate-g", "gen-loss")
"""Names of the ablations, as the paper has them (Tables 4 and 8)."""

BASELINES: dict[str, dict[str, Any]] = {
    "transformer": {},
    "mime": {},
    "cem": {"label_smoothing": 0.0},
    "empdg": {"copy": True, "emotion_start": True},
    "kemp": {"commonsense": True, "copy": True, "emotion_start": True, "graph_dropout": 0.2},
}
"""The paper's rivals that can be trained here, and the settings of their authors' commands beyond sizes."""

WORD_LEVEL = (
    "encoder_blocks",
    "decoder_blocks",
    "heads",
    "attention_dim",
    "feed_forward",
    "tie_embeddings",
    "copy",
    "emotion_start",
    "commonsense",
    "graph_form",
    "emotion_table",
)
"""Settings of the word-level encoder and decoder, which a backbone has no use for."""

WEIGHTS = ("float32", "bfloat16", "int8")
"""Number formats of the weights that a model may generate with."""
PAPER_GRAPH = ("graph_norm", "own_weight", "graph_bias", "score_scale")
"""Settings of the graph form ``paper``, which ``released`` has no use for."""


GRAPH = (
    "graph_layers",
    "thresholds",
    "graph_norm",
    "own_weight",
    "graph_bias",
    "score_scale",
    "graph_dropout",
)
"""Settings of the emotion graph, which does nothing with them where there is none."""
GRAPH_LOSSES = ("gamma_correlation", "eco_form")
"""Settings of the correlation loss (Eq. 18)."""


def setting(
    default: Any, help: str, choices: tuple[str, ...] | None = None, before: Any = dataclasses.MISSING
) -> Any:
    """Return a dataclass field that :func:`add_arguments` makes a flag of.

    Args:
        before: value of all that was made before the field was, where that is not the default: an older
            ``config.json`` lacks the field, and its model stays what it was.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "before": before})


@dataclass(frozen=True)
class ModelConfig:
    """The architecture and its losses; defaults are the paper's (Section 4.2, Appendix D)."""

    model: str = setting(
        "ecore", "the system: E-CORE, or one of the paper's rivals (docs/baselines.md)", ("ecore", *BASELINES)
    )
    dim: int = setting(300, "feature dimension D")
    encoder_blocks: int = setting(4, "transformer blocks of the encoder")
    decoder_blocks: int = setting(4, "transformer blocks of the decoder")
    heads: int = setting(3, "attention heads of encoder and decoder")
    attention_dim: int | None = setting(None, "width of all heads together (default: D)")
    feed_forward: int | None = setting(None, "hidden width of the feed-forward layers (default: 4 D)")
    graph_layers: int = setting(2, "layers L of the emotion graph")
    thresholds: tuple[float, ...] = setting(
        (0.0, 0.075, 0.15), "intensity threshold of each graph resolution"
    )
    strategy: str = setting(
        "soft",
        "how perceived emotions guide generation; none: no graph and (without --emotions) no emotions, the plain "
        "Transformer",
        ("soft", "hard", "none"),
    )
    emotions: bool = setting(
        False,
        "strategy none predicts the emotion, too, from the mean of the encoded context, without a graph",
    )
    max_relevant: int = setting(5, "hard strategy: OTSU considers at most this many relevant emotions")
    ablations: tuple[str, ...] = setting((), "parts to leave out", ABLATIONS)
    eco_form: str = setting("softmax", "form of the emotion correlation loss", ("softmax", "inner", "cosine"))
    gamma_emotion: float = setting(1.0, "weight of the emotion loss (gamma 1)")
    gamma_correlation: float = setting(1.0, "weight of the emotion correlation loss (gamma 2)")
    correlation_prior: float = setting(
        0.0,
        "weight of a loss that teaches R how often words of two emotions (Table 12) occur in one training dialogue",
    )
    label_smoothing: float = setting(0.1, "label smoothing of the generation loss")
    graph_form: str = setting(
        "paper",
        "the graph and the losses on it; released: those of the authors' code, another graph (docs/model.md has the "
        "differences)",
        ("paper", "released"),
    )
    emotion_table: bool | None = setting(
        None,
        "emotions have an embedding table of their own, and not their words' vectors (default: with --graph-form "
        "released)",
    )
    graph_norm: bool = setting(True, "norms of the graph's features and edges; off is as the paper prints it")
    own_weight: bool = setting(
        True,
        "in Eq. 8 an emotion's own weight stays 1, and what it hears from others is bounded; off: the whole row is "
        "bounded, as in older runs",
        before=False,
    )
    graph_bias: bool = setting(
        False,
        "biases in the graph's projections, as in older runs; the paper's are bare matrices",
        before=True,
    )
    score_scale: float | None = setting(
        None, "scale of graph scores (default: 1/sqrt(D/K); 1.0 is as the paper prints it)"
    )
    dropout: float = setting(0.2, "dropout on embeddings and on sublayer outputs of encoder and decoder")
    graph_dropout: float = setting(0.1, "dropout on graph features")
    tie_embeddings: bool = setting(False, "share the output weights with the word embedding")
    copy: bool = setting(
        False, "words of the context may be copied (pointer-generator), as in the released code"
    )
    emotion_start: bool = setting(
        False, "the response starts from the predicted emotions' logits, as in the released code"
    )
    commonsense: bool = setting(True, "append related words where the prepared data has relations")
    inferences: str | None = setting(
        None,
        "file of commonsense inferences about utterances, for model cem (docs/baselines.md has the format)",
    )
    backbone: str | None = setting(
        None,
        "pre-trained GPT-2 to build on: a folder, or a name on the Hugging Face hub (default: from scratch)",
    )

    def __post_init__(self) -> None:
        check(self)
        resolutions = len(self.thresholds)
        width = self.attention_dim or self.dim
        if not self.thresholds or self.thresholds[0] != 0.0:
            raise InputError(f"thresholds: expected the first to be 0, got {self.thresholds}")
        if self.dim % resolutions:
            raise InputError(f"dim: {self.dim} cannot be split into {resolutions} graph resolutions")
        if width % self.heads:
            raise InputError(f"heads: a width of {width} cannot be split into {self.heads} heads")
        if self.strategy == "none" and self.ablations:
            raise InputError(f"ablations: strategy none has no {self.ablations[0]!r} to leave out")
        if self.emotions and self.strategy != "none":
            raise InputError(
                f"emotions: strategy {self.strategy} predicts them anyway; expected strategy none"
            )
        if self.emotions and self.backbone is not None:
            raise InputError("emotions: of no use with a backbone, which predicts them with its graph alone")
        for name, chosen in (("graph_form", self.released), ("emotion_table", self.own_emotions)):
            if chosen and self.backbone is not None:
                raise InputError(f"{name}: of no use with a backbone; expected the default")
        if self.model != "ecore" and not (self.strategy == "none" and self.emotions):
            raise InputError(
                f"model: {self.model} has no emotion graph and predicts emotions; expected strategy none with emotions"
            )
        if self.inferences is not None and self.model != "cem":
            raise InputError(f"inferences: of no use with model {self.model}; expected model cem")
        if self.emotion_start and not self.perceives:
            raise InputError(
                "emotion_start: strategy none predicts no emotions to start from; emotions adds them"
            )

    @property
    def released(self) -> bool:
        """Return whether the graph is the released code's."""
        return self.graph_form == "released"

    @property
    def own_emotions(self) -> bool:
        """Return whether emotions have an embedding table of their own."""
        return self.released if self.emotion_table is None else self.emotion_table

    @property
    def title(self) -> str:
        """The system in a few words: ``soft strategy``, ``mime``."""
        return f"{self.strategy} strategy" if self.model == "ecore" else self.model

    @property
    def perceives(self) -> bool:
        """Return whether the model predicts emotions."""
        return self.strategy != "none" or self.emotions


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation; defaults are the paper's (Appendix D)."""

    batch_size: int = setting(16, "samples a step")
    accumulate: int = setting(1, "batches whose gradients are averaged in one step")
    max_steps: int = setting(26_000, "steps to train")
    warmup: int = setting(8_000, "steps of rising learning rate (Noam)")
    factor: float = setting(1.0, "factor on the learning rate (Noam)")
    validate_every: int = setting(2_000, "steps between validations")
    validate_limit: int | None = setting(
        None, "validate on the first N samples of the split; the best checkpoint is theirs (default: all)"
    )
    checkpoint_every: int | None = setting(
        None,
        "steps between checkpoints (default: none until two minutes after the last); each validation writes one, too",
    )
    log_every: int = setting(25, "steps between lines of metrics.jsonl")
    patience: int | None = setting(
        None, "stop after this many validations without improvement (default: never)"
    )
    seed: int = setting(0, "seed of everything random")
    precision: str = setting(
        "float32",
        "arithmetic; float32: IEEE, whatever torch is set to; tf32: a GPU's tensor cores multiply float32 rounded to "
        "10 bits (on a CPU the same as float32); bfloat16, float16: of the forward pass, by autocast; bfloat16 is "
        "faster on a CPU with instructions for it; auto: the fastest of float32, bfloat16 and on a GPU tf32, by a "
        "trial of a second",
        ("float32", "tf32", "bfloat16", "float16", "auto"),
    )
    cuda_graphs: bool = setting(
        False,
        "on a GPU: record each shape's step as a CUDA graph, which spares launching its kernels one by one",
    )
    compile: bool = setting(False, "torch.compile the losses: minutes of compiling before the first steps")

    def __post_init__(self) -> None:
        check(self)
        if self.cuda_graphs and self.accumulate > 1:
            raise InputError(f"cuda_graphs: expected accumulate 1, got {self.accumulate}")
        if self.cuda_graphs and self.precision == "float16":
            raise InputError("cuda_graphs: expected precision float32, tf32 or bfloat16, got float16")


_RIVALS_ATTENTION: dict[str, Any] = {"heads": 2, "attention_dim": 40, "feed_forward": 50, "dropout": 0.0}
"""Blocks of the code that the authors and their rivals share: they have no dropout."""

PRESETS: dict[str, tuple[ModelConfig, TrainingConfig]] = {
    "paper": (ModelConfig(), TrainingConfig()),
    # What the authors' published command trains; for K = 2 its code takes the thresholds 0 and 0.15.
    "released": (
        ModelConfig(
            encoder_blocks=4,
            decoder_blocks=4,
            **_RIVALS_ATTENTION,
            thresholds=(0.0, 0.15),
            copy=True,
            emotion_start=True,
            graph_form="released",
        ),
        TrainingConfig(),
    ),
    # What the paper's rivals CEM, KEMP and EmpDG are; docs/model.md lists where this differs.
    "baseline": (
        ModelConfig(encoder_blocks=1, decoder_blocks=1, **_RIVALS_ATTENTION),
        TrainingConfig(),
    ),
    "tiny": (
        # Strongly regularised: it is meant for some hundred conversations.
        ModelConfig(dim=96, encoder_blocks=1, decoder_blocks=1, feed_forward=192, dropout=0.3),
        TrainingConfig(max_steps=500, warmup=100, factor=0.3, validate_every=500, log_every=10),
    ),
}
"""The named settings: ``paper``, ``released``, ``baseline`` and ``tiny``."""

PUBLISHED_SIZES = "baseline"
"""The preset with the sizes at which the authors of the baselines publish them."""

Config = TypeVar("Config", bound="DataclassInstance")


def for_model(config: ModelConfig, model: str) -> ModelConfig:
    """Return the settings of ``model`` at the sizes of ``config``, which is E-CORE's.

    A baseline has no graph, and of the optional parts those that its authors' command turns on.
    """
    if model not in BASELINES:
        return config
    parts = {"commonsense": False, "copy": False, "emotion_start": False} | BASELINES[model]
    graphless: dict[str, Any] = {
        "strategy": "none",
        "emotions": True,
        "graph_form": "paper",
        "emotion_table": None,
    }
    return dataclasses.replace(config, model=model, ablations=(), correlation_prior=0.0, **graphless, **parts)


def without_effect(config: ModelConfig) -> dict[str, str]:
    """Return the settings that change nothing in a model of ``config``, each with the reason."""
    idle: dict[str, str] = {}

    def add(why: str, *names: str) -> None:
        for name in names:
            idle.setdefault(name, why)

    if config.strategy == "none":
        system = "strategy none" if config.model == "ecore" else f"model {config.model}"
        own = ("graph_dropout",) if config.model == "kemp" else ()
        graph = (*GRAPH, *GRAPH_LOSSES, "correlation_prior", "max_relevant", "graph_form", "emotion_table")
        add(f"{system} has no emotion graph", *(name for name in graph if name not in own))
        if not config.emotions:
            add("strategy none without --emotions predicts none", "gamma_emotion")
        return idle
    if config.strategy == "soft":
        add("strategy soft splits no emotions", "max_relevant")
    if "graph" in config.ablations:
        add("--ablate graph leaves the graph out", "graph_layers", "thresholds", "graph_bias", "score_scale")
        add("--ablate graph leaves the graph out", "graph_dropout")
    if "co-loss" in config.ablations:
        add("--ablate co-loss leaves that loss out", *GRAPH_LOSSES)
    if "co-p" in config.ablations:
        add("--ablate co-p leaves the correlation out of the perception", "own_weight")
    return idle


def to_dict(config: ModelConfig | TrainingConfig) -> dict[str, Any]:
    """Return the settings as a JSON-ready dictionary."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """Return the settings from :func:`to_dict`'s dictionary; fields that it lacks take the value of its time.

    Raises:
        InputError: a name that the class does not have, or a value out of range.
    """
    known = {item.name: item.metadata["before"] for item in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise InputError(f"{cls.__name__}: unknown setting {name!r}")
    values = {name: before for name, before in known.items() if before is not dataclasses.MISSING} | values
    try:
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**settings)
    except TypeError as error:
        raise InputError(f"{cls.__name__}: a setting of the wrong type ({error})") from None


def add_arguments(parser: argparse._ArgumentGroup, cls: type[Config], skip: tuple[str, ...] = ()) -> None:
    """Give ``parser`` one flag per field of ``cls`` (``--max-steps N``); None where it is not given.

    The help names the class's own default, which is the preset ``paper``'s.
    """
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.name in skip:
            continue
        kinds = [t for t in typing.get_args(hints[item.name]) or (hints[item.name],) if t is not type(None)]
        kind = kinds[0]
        help = item.metadata["help"]
        if item.default is not None and item.default != ():
            default = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
            help += f" (default: {'off' if default is False else 'on' if default is True else default})"
        options: dict[str, Any] = {"help": help, "default": None, "dest": item.name}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
            options["choices"] = item.metadata["choices"]
            if isinstance(item.default, tuple):
                options |= {"nargs": "+", "action": "extend"}
            if not options["choices"]:
                options["metavar"] = {int: "N", float: "X"}.get(kind, "NAME")
        parser.add_argument("--" + item.name.replace("_", "-"), **options)


def overrides(arguments: argparse.Namespace, cls: type[Config]) -> dict[str, Any]:
    """The settings of ``cls`` that the command line gave, ready for :func:`dataclasses.replace`."""
    given = {item.name: getattr(arguments, item.name, None) for item in dataclasses.fields(cls)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
