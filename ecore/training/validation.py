"""Scoring a validation split while training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecore.data.batches import Split
from ecore.metrics import perplexity
from ecore.model.base import EmpatheticModel


@torch.no_grad()
def score(
    model: EmpatheticModel,
    split: Split,
    source: Any,
    batches: Iterable[npt.NDArray[np.int64]],
    around: Callable[[], contextlib.AbstractContextManager[Any]],
    stop: Callable[[], bool],
) -> list[Tensor] | None:
    """Score batches in eval mode, in which the model stays.

    Args:
        split: whose numbers ``batches`` hold.
        source: gives its batches, if need be already on the model's device.
        around: the context of each batch's scoring (autocast).
        stop: asked before each batch.

    Returns:
        For each batch [3, B] float64 on the CPU: the sample's NLL, its words, and 1 where its emotion was right; None
        where it was stopped.
    """
    model.eval()
    scored = []
    for indices in batches:
        if stop():
            return None
        batch = source.batch(indices).to(model.device)
        with around():
            scores = model.score(batch, int(split.response_lengths[indices].sum()))
        perceived = scores.encoding.perceived
        right = torch.zeros_like(batch.emotion)
        if perceived is not None:
            right = perceived.main_logits.argmax(-1) == batch.emotion
        scored.append(torch.stack([scores.nll, scores.tokens.double(), right.double()]))
    return [part.cpu() for part in scored]  # only now: a look makes the host wait for the device


def results(scored: Sequence[Tensor]) -> dict[str, float] | None:
    """Perplexities and emotion accuracy in percent, from :func:`score`'s; None where an NLL is not finite."""
    nll, tokens, right = torch.cat(list(scored), dim=1)
    if not nll.isfinite().all():
        return None
    per_token, per_sample = perplexity(nll.numpy(), tokens.long().numpy())
    return {
        "valid_ppl": per_token,
        "valid_ppl_per_sample": per_sample,
        "valid_emotion_accuracy": 100 * right.mean().item(),
    }
