"""Answers with weights of few bits beside float32's: how many are the same, and words a second at one context."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from ecore import pretrained
from ecore.config import WEIGHTS
from ecore.data.batches import Split
from ecore.data.prepared import PreparedData
from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.model.base import EmpatheticModel

BATCH = 50
TIMED = 20
"""Contexts that are answered one at a time, each round."""


def compare(run: Path, data: Path | None, contexts: int, rounds: int) -> dict[str, Any]:
    """Return agreement and times of a run's greedy answers to the first ``contexts`` of the test split.

    Raises:
        InputError: a folder that is missing or damaged, or a model that has no such weights.
    """
    model = pretrained.load(run).eval()
    split = PreparedData.load(data or pretrained.data_folder(run)).test
    if contexts > len(split):
        raise InputError(
            f"--contexts: expected at most {len(split)}, those of the test split, got {contexts}"
        )
    models = {weights: copy.deepcopy(model) for weights in WEIGHTS}
    for weights, one in models.items():
        one.quantize(weights)
    answers = {weights: _answers(one, split, contexts) for weights, one in models.items()}
    return {
        "contexts": contexts,
        "threads": torch.get_num_threads(),
        "agreement": {w: agreement(answers["float32"], answers[w]) for w in WEIGHTS if w != "float32"},
        "timings": _timings(models, split, rounds),
    }


def _answers(model: EmpatheticModel, split: Split, count: int) -> list[list[int]]:
    found: list[list[int]] = []
    for begin in range(0, count, BATCH):
        found += generate(model, split.batch(np.arange(begin, min(begin + BATCH, count))), Decoding())
    return found


def agreement(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the shares of answers that are the same, and of words that are the same in the same place.

    An answer's words are as many as the longer one's: after a first other word nearly all others are.
    """
    pairs = list(zip(expected, found, strict=True))
    same = sum(a == b for pair in pairs for a, b in zip(*pair, strict=False))
    return {
        "answers": sum(a == b for a, b in pairs) / len(pairs),
        "words": same / sum(max(map(len, pair)) for pair in pairs),
    }


def _timings(models: Mapping[str, EmpatheticModel], split: Split, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median of a word's seconds and of float32's over it, answers found in turn, one context each."""
    batches = [split.batch(np.array([i])) for i in range(TIMED)]
    seconds: dict[str, list[float]] = {weights: [] for weights in models}
    for turn in range(rounds + 1):
        for batch in batches:
            for weights, model in models.items():
                begin = time.perf_counter()
                answer = generate(model, batch, Decoding())[0]
                if turn:  # the first one warms up
                    seconds[weights].append((time.perf_counter() - begin) / (len(answer) + 1))  # EOS
    plain = np.array(seconds["float32"])
    return {
        weights: {"median": float(np.median(s)), "ratio": float(np.median(plain / np.array(s)))}
        for weights, s in seconds.items()
    }


def report(result: Mapping[str, Any]) -> str:
    """The table, as Markdown."""
    lines = []
    for weights, timing in result["timings"].items():
        same = result["agreement"].get(weights)
        shares = ["", ""] if same is None else [f"{100 * same[of]:.1f} %" for of in ("answers", "words")]
        lines.append(
            [
                weights,
                harness.duration(timing["median"]),
                f"{1 / timing['median']:,.0f}",
                f"{timing['ratio']:.2f}",
                *shares,
            ]
        )
    heads = ("weights", "a word", "words/s", "float32 / this", "same answers", "same words")
    return f"{result['contexts']} contexts, {result['threads']} threads, greedy\n\n" + harness.table(
        heads, lines
    )
