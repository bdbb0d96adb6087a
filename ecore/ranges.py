"""Types and ranges of settings: one check for flags, Python and ``config.json``."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import TYPE_CHECKING, Any, NamedTuple

from ecore.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Range(NamedTuple):
    """Numbers that a setting may have, both ends counted; ``wanted`` says so where the ends alone would not."""

    least: float
    most: float
    wanted: str = ""


_COUNT = Range(1, 10**9)
_SHARE = Range(0.0, math.nextafter(1.0, 0.0), "a number in [0, 1)")
_WEIGHT = Range(0.0, 1e6, "a number in [0, 1e6]")

RANGES = {
    "dim": Range(1, 2**16),
    "encoder_blocks": Range(1, 1000),
    "decoder_blocks": Range(1, 1000),
    "heads": Range(1, 2**16),
    "attention_dim": Range(1, 2**16),
    "feed_forward": Range(1, 2**20),
    "graph_layers": Range(1, 1000),
    "thresholds": Range(0.0, 1.0, "numbers in [0, 1]"),
    "max_relevant": Range(1, 10**6),
    "gamma_emotion": _WEIGHT,
    "gamma_correlation": _WEIGHT,
    "correlation_prior": _WEIGHT,
    "label_smoothing": _SHARE,
    "score_scale": Range(-1e6, 1e6, "a number in [-1e6, 1e6]"),
    "dropout": _SHARE,
    "graph_dropout": _SHARE,
    "batch_size": Range(1, 10**6),
    "accumulate": Range(1, 10**6),
    "max_steps": _COUNT,
    "warmup": _COUNT,
    "factor": Range(1e-12, 1e6, "a number over 0, at most 1e6"),
    "validate_every": _COUNT,
    "validate_limit": _COUNT,
    "checkpoint_every": _COUNT,
    "log_every": _COUNT,
    "patience": _COUNT,
    "beams": Range(1, 4096),
    # Lengths to this power are divided by, in float32.
    "length_penalty": Range(-10.0, 10.0, "a finite number in [-10, 10]"),
    "top_k": Range(0, 10**6),
    "top_p": Range(math.nextafter(0.0, 1.0), 1.0, "a number over 0, at most 1"),
    "temperature": Range(1e-30, 1e6, "a number over 0, from 1e-30 to 1e6"),
    "max_length": Range(1, 2**16),
    "no_repeat_ngram": Range(0, 2**16),
    "threads": Range(1, 1024),
    "port": Range(0, 65535),
    "wait_ms": Range(0.0, 10_000.0, "a number in [0, 10000]"),
    "queue": Range(1, 10**6),
    "seed": Range(0, 2**63 - 1, "a number in [0, 2^63)"),
}
"""Ranges by the name of the setting. One that is not here may be any finite number."""


def check(config: DataclassInstance) -> None:
    """Check every field of a frozen dataclass: its type by its annotation, its choices, its range.

    Raises:
        InputError: a value that the field cannot have.
    """
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, kinds = getattr(config, item.name), typing.get_args(hints[item.name])
        if value is None and type(None) in kinds:
            continue
        kind = next((k for k in kinds if k is not type(None)), hints[item.name])
        values = (value,)
        if typing.get_origin(hints[item.name]) is tuple:
            if not isinstance(value, tuple):
                raise InputError(f"{item.name}: expected a list, got {_shown(value)}")
            values = value
        for one in values:
            check_value(item.name, one, kind, item.metadata["choices"])


def check_value(name: str, value: Any, kind: Any, choices: tuple[str, ...] | None = None) -> None:
    """Check one value of setting ``name``: bool, text, or an int or float in its range.

    Raises:
        InputError: see :func:`check`.
    """
    wanted = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[kind]
    accepted = (int, float) if kind is float else (kind,)
    if choices:
        wanted = f"one of {', '.join(choices)}"
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{name}: expected {wanted}, got {_shown(value)}")
    if choices and value not in choices:
        raise InputError(f"{name}: expected {wanted}, got {value!r}")
    if kind in (int, float):
        _check_range(name, value, RANGES.get(name))


def _check_range(name: str, value: float, bounds: Range | None) -> None:
    # Comparisons are false for NaN, and exact for whole numbers that no float can hold.
    if bounds is None:
        bounds = Range(-1e308, 1e308, "a finite number")
    if bounds.least <= value <= bounds.most:
        return
    wanted = bounds.wanted or (
        f"at least {bounds.least:g}" if value < bounds.least else f"at most {int(bounds.most):,}"
    )
    raise InputError(f"{name}: expected {wanted}, got {_shown(value)}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a longer number"
    return text if len(text) <= 40 else f"{text[:40]}..."
