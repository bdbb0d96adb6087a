"""Scoring a validation split while training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecore.config import TrainingConfig
from ecore.data.batches import Split, length_buckets, resident
from ecore.metrics import perplexity
from ecore.model.base import EmpatheticModel
from ecore.training.checkpoint import Progress
from ecore.training.distributed import Processes


class Validator:
    """Scores a run's validation split, or its first samples, each process its part of the batches.

    Args:
        model: scored as it is at each call.
        split: the samples, as the model reads them.
        device: of the training.
        config: has the size of a batch of training, and the limit of samples.
        processes: those that train together.
    """

    def __init__(
        self,
        model: EmpatheticModel,
        split: Any,
        device: torch.device,
        config: TrainingConfig,
        processes: Processes,
    ) -> None:
        self._model, self._split, self._processes = model, split, processes
        on_gpu = device.type == "cuda"
        self._source = resident(split, device) if on_gpu else split
        # Without gradients four times the samples fit; a GPU takes many as quickly as few.
        self._batch_size = (16 if on_gpu else 4) * config.batch_size
        self._limit = config.validate_limit

    def score(
        self,
        around: Callable[[], contextlib.AbstractContextManager[Any]],
        stop: Callable[[], bool],
        shown: Callable[[Sequence[npt.NDArray[np.int64]]], Any],
    ) -> list[Tensor] | None:
        """Score the samples; the result is that of all processes, and the same in each.

        Args:
            around, stop: as in :func:`score`.
            shown: makes of this process's batches a progress bar over them.

        Returns:
            As :func:`score`, of all batches; None where any process was stopped.
        """
        batches = length_buckets(self._split, self._batch_size, seed=0, epoch=0, limit=self._limit)
        bar = shown(batches[self._processes.rank :: self._processes.count])
        scored = score(self._model, self._split, self._source, bar, around, stop)
        bar.close()
        if self._processes.any(scored is None):
            return None
        return [batch for part in self._processes.gather(scored) for batch in part]


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


def judge(progress: Progress, ppl_per_sample: float, counts: bool) -> bool:
    """Enter a validation of the present step into ``progress``; return whether it is the best so far.

    Args:
        ppl_per_sample: what it found.
        counts: one that is not the best counts as stale, for the run's patience.
    """
    progress.validated = progress.step
    if progress.best is None or ppl_per_sample < progress.best:
        progress.best, progress.best_step, progress.stale = ppl_per_sample, progress.step, 0
        return True
    progress.stale += counts
    return False
