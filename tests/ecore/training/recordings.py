"""Stand-ins for CUDA graphs, and what tests of recorded steps compare.

On a CPU a stand-in does what a graph does: it writes a step's operations down without their effects, and repeats them
on the same tensors, without the Python between them.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecore.data.batches import ResidentSplit
from ecore.training.cuda_graphs import CaptureFailed
from ecore.training.journal import read_metrics

SLOW = {"factor": 0.02}  # long steps would blow rounding up


class Writing(TorchDispatchMode):
    """Keeps every operation with its tensors, and what the tensors held that it overwrote."""

    def __init__(self, refused=None):
        super().__init__()
        self.operations, self.before, self.refused = [], {}, refused

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation.overloadpacket is self.refused:
            raise CaptureFailed("operation not permitted when stream is capturing")
        for argument, value in zip(operation._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    storage = tensor.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, result))
        return result


class Repeater:
    """The stand-in for CUDA graphs; recording number ``failing`` fails where the optimiser is about to begin."""

    def __init__(self, failing=None):
        self.recorded = self.replayed = self.asked = 0
        self.failing = failing

    def warm_up(self, work):
        return work()

    def record(self, work):
        self.asked += 1
        random = torch.get_rng_state()
        written = Writing(torch.ops.aten._fused_adam_ if self.asked == self.failing else None)
        try:
            with written:
                taken = work()
        finally:
            torch.set_rng_state(random)
            for storage, content in written.before.values():
                storage.copy_(content)
        self.recorded += 1

        @torch.no_grad()
        def replay():
            for operation, args, kwargs, result in written.operations:
                again = operation(*args, **kwargs)
                for kept, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)
            self.replayed += 1
            return taken

        return replay


class Again:
    """No recording at all: the same steps, one by one."""

    def warm_up(self, work):
        return work()

    def record(self, work):
        return work


def assert_close(
    run, other, rtol=1e-4, names=("loss", "gen", "emotion_", "corr", "nll", "valid_ppl", "health")
):
    lines, wanted = read_metrics(run), read_metrics(other)
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, one in zip(lines, wanted, strict=True):
        assert line["lr"] == one["lr"]
        for name, value in one.items():
            if name == "emotion" or name.startswith(names):
                assert line[name] == pytest.approx(value, rel=rtol, abs=1e-5), (name, line["step"])


def still(config):
    return replace(config, dropout=0.0, graph_dropout=0.0)


def resident(data, device="cpu"):
    return ResidentSplit(data.train, device)
