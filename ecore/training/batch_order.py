"""The order in which training takes the samples of a split, and each process's part of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ecore.data.batches import length_buckets
from ecore.training.checkpoint import Progress
from ecore.training.distributed import Processes


class Part(NamedTuple):
    """One process's samples of a batch.

    Attributes:
        samples: int64 [b], their numbers in the split; never none, since every process has to take the step.
        share: ``b`` over the samples of the batch; 0.0 where they are too few for all processes, and the one of this
            process counts nothing.
        batch_size: samples of the batch, those of all processes.
    """

    samples: npt.NDArray[np.int64]
    share: float
    batch_size: int


class BatchOrder:
    """The batches of a split, epoch after epoch; the order is the same for the same seed.

    The position is that of ``progress``, so that a resumed run takes the batches that one never stopped would take.

    Args:
        split: whose samples they are (:class:`ecore.data.batches.Split`, or one that reads like it).
        batch_size: samples of a batch, those of all processes.
        seed: of the order.
        progress: its ``epoch`` and ``batches`` are read here, and moved on by :meth:`take`.
        processes: those that train together; each takes its part of a batch.
    """

    def __init__(
        self, split: Any, batch_size: int, seed: int, progress: Progress, processes: Processes
    ) -> None:
        self._split, self._batch_size, self._seed = split, batch_size, seed
        self._progress, self._processes = progress, processes
        self._batches = self._epoch()

    def _epoch(self) -> list[npt.NDArray[np.int64]]:
        return length_buckets(self._split, self._batch_size, self._seed, self._progress.epoch)

    def take(self) -> Part:
        """Move on to the next batch, after the last one of an epoch to the first of the next epoch."""
        if self._progress.batches == len(self._batches):
            self._progress.epoch, self._progress.batches = self._progress.epoch + 1, 0
            self._batches = self._epoch()
        self._progress.batches += 1
        return self.present

    @property
    def present(self) -> Part:
        """This process's part of the batch that was taken last."""
        batch = self._batches[self._progress.batches - 1]
        mine = batch[self._processes.rank :: self._processes.count]
        if not len(mine):
            return Part(batch[:1], 0.0, len(batch))
        return Part(mine, len(mine) / len(batch), len(batch))
