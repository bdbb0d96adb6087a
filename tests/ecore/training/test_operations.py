"""A recorded step is made of few operations: each is a launch on a GPU."""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ecore.config import PRESETS
from ecore.data.batches import ResidentSplit, Split, Widths
from ecore.data.vocabulary import SPECIAL_WORDS
from ecore.model import ECore
from ecore.training.journal import sums
from ecore.training.schedule import adam

MOST = 600
"""Operations of a step of the preset ``paper``: 1,086 before anything was joined."""


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched, without views, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        returns = operation._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and operation._schema.name not in (
            "aten::detach",
            "aten::_unsafe_view",
            "aten::promote_types",
        ):
            self.count[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def operations(data, health):
    """Of a step from the samples' numbers on, in the sizes that a recording has."""
    config = replace(PRESETS["paper"][0], dim=12, feed_forward=16)
    model = ECore(config, data.vocabulary, data.tables).train()
    optimizer, rows = adam(model.parameters()), torch.arange(8)
    related = np.full((len(data.train), 3), len(SPECIAL_WORDS))
    arrays = data.train.arrays._replace(concepts=related)
    split = ResidentSplit(Split("train", arrays, data.vocabulary.emotions), "cpu")

    def step():
        losses = model.loss(split.gather(rows, Widths(32, 64, split.concepts)), health, 127)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sums(losses, 1.0)

    step()
    with Operations() as seen:
        step()
    return seen.count


def test_a_step_has_few_operations(data):
    count = operations(data, health=False)
    assert count["aten.mm.default"] > 50  # it is a whole step
    assert sum(count.values()) <= MOST, count.most_common(20)


def test_health_is_of_logged_steps_alone(data):
    """Its kernels are not in the others."""
    assert sum(operations(data, health=True).values()) >= sum(operations(data, health=False).values()) + 20
