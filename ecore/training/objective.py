"""The loss as a module, which torch.compile and DistributedDataParallel can look after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbols
from torch.nn.parallel import DistributedDataParallel

from ecore.data.batches import Batch
from ecore.model.base import EmpatheticModel
from ecore.model.losses import Losses


class Objective(nn.Module):
    """:meth:`ecore.model.base.EmpatheticModel.loss` as a module's forward."""

    def __init__(self, model: EmpatheticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, health: bool, tokens: int) -> Losses:
        """A batch's losses, from words of the responses of at most ``tokens``."""
        return self.model.loss(batch, health, tokens)


def objective(model: EmpatheticModel, compiled: bool, processes: int) -> Any:
    """An :class:`Objective` through torch.compile, or with gradients averaged over ``processes`` if there are more."""
    module = Objective(model)
    if compiled:
        # Steps are recorded with --cuda-graphs; inductor's own graphs cannot be part of a recording.
        calls: Any = torch.compile(module, dynamic=True, options={"triton.cudagraphs": False})
        # Sizes that are equal in a batch by chance shall not be one symbol: the next batch would be compiled again.
        calls = symbols.patch(use_duck_shape=False)(calls)  # type: ignore[attr-defined]  # torch adds it at run time
        # The operators' scales are constants; torch.compile shall not make symbols of them. Both settings are the whole
        # process's, so they hold for these calls alone.
        return torch._dynamo.config.patch(specialize_float=True)(calls)
    if processes == 1:
        return module
    return DistributedDataParallel(
        module,
        broadcast_buffers=False,  # they are constants
        # Otsu's split has no gradient, and ablations leave parts unused.
        find_unused_parameters=model.config.strategy == "hard" or bool(model.config.ablations),
    )
