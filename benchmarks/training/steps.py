"""Training steps with improvements taken out one by one, and the configurations that are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workload import Workload, wait
from ecore.data.batches import Batch
from ecore.data.vocabulary import PAD
from ecore.model import ecore as model_module
from ecore.model import graph_network as graph_module
from ecore.model import packing as packing_module
from ecore.model import perceiver as perceiver_module
from ecore.model import transformer as transformer_module
from ecore.model.decoder import Decoded, Decoder
from ecore.model.dropout import Dropout
from ecore.model.encoder import Embedding
from ecore.model.packing import Packing, Padded
from ecore.precision import LowWeights, autocast, float32_products
from ecore.training.cuda_graphs import CapturedStep, CudaGraphs, Recorder, Taken
from ecore.training.objective import objective
from ecore.training.schedule import adam
from ecore_kernels import module as attention_module


def _plain_losses(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    label_smoothing: float,
    scale: float,
    copying: None,
) -> tuple[Tensor, Tensor]:
    log_probability = F.log_softmax(F.linear(states, weight, bias), dim=-1, dtype=torch.float32)
    nll = -log_probability.gather(1, targets[:, None])[:, 0]
    smoothed = (1.0 - label_smoothing) * nll - label_smoothing * log_probability.mean(-1)
    padding = targets == PAD
    return scale * smoothed.masked_fill(padding, 0.0).sum(), nll.detach().masked_fill(padding, 0.0)


def _plain_look_up(self: Embedding, *words: Tensor) -> list[Tensor]:
    return [self.word(ids) * self.scale for ids in words]


def _never(*_: Any) -> bool:
    """In place of a condition; a mock would keep the tensors that it is asked about until the step ends."""
    return False


_packed_decoder = Decoder.forward


def _padded_decoder(
    self: Decoder,
    y: Tensor,
    memory: Tensor,
    mask: Tensor,
    guidance: Tensor | None,
    packing: Packing | None,
    memory_layout: Packing | Padded | None,
) -> Decoded:
    if packing is None:
        return _packed_decoder(self, y, memory, mask, guidance, None, memory_layout)
    states, scores = _packed_decoder(self, packing.unpack(y), memory, mask, guidance)
    return Decoded(packing.pack(states), None if scores is None else packing.pack(scores))


def _plain_end(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float, *, eps: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    total = residual + Dropout(p)(x)
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


@contextlib.contextmanager
def _plain_graph() -> Iterator[None]:
    """Run the graph's operators in plain PyTorch, and no others."""
    with contextlib.ExitStack() as stack:
        for module, name in (
            (attention_module, "graph_attention"),
            (graph_module, "edge_readout"),
            (perceiver_module, "otsu"),
        ):
            plain = partial(getattr(module, name), backend="reference")
            stack.enter_context(mock.patch.object(module, name, plain))
        yield


KEPT = "freed memory kept"
"""The improvement that a process has or has not; those of :mod:`benchmarks.training.runner` have what they say."""

WITHOUT: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "fused graph operators": _plain_graph,
    "chunked vocabulary loss": lambda: mock.patch.object(model_module, "vocabulary_losses", _plain_losses),
    "one look-up of words": lambda: mock.patch.object(Embedding, "look_up", _plain_look_up),
    "packed responses": lambda: mock.patch.object(Decoder, "forward", _padded_decoder),
    "packed contexts, attention among rows": lambda: mock.patch.object(
        packing_module, "attends_among_rows", _never
    ),
    "dropout, sum and norm in one": lambda: mock.patch.object(
        transformer_module, "dropout_add_layer_norm", _plain_end
    ),
    "quick dropout masks": lambda: mock.patch.object(Dropout, "forward", nn.Dropout.forward),
    "fused optimiser": contextlib.nullcontext,  # chosen when the optimiser is made
    KEPT: contextlib.nullcontext,
}
"""Each improvement, and how it is taken out: plain PyTorch in its place."""

ON_CPUS = ("quick dropout masks", KEPT)

LOW = ("tf32", "bfloat16")
"""Precisions below float32."""


class Steps:
    """Training steps of one configuration.

    Args:
        work: model and batches.
        parts: improvements that are on, of :data:`WITHOUT`, and "tf32", "bfloat16", "torch.compile" or "CUDA graphs".
        device: "cpu" or "cuda".
        recorder: what records steps; None makes CUDA graphs.
        **settings: of the model.
    """

    def __init__(
        self,
        work: Workload,
        parts: Sequence[str],
        device: str = "cpu",
        recorder: Recorder | None = None,
        **settings: Any,
    ) -> None:
        self.off = [take_out for name, take_out in WITHOUT.items() if name not in parts]
        self.device, self.model = device, work.model(**settings).to(device)
        if "fused optimiser" in parts:
            self.optimizer = adam(self.model.parameters())
        else:
            # A recorded step's learning rate is a tensor: the Adam of all tensors at once takes one where it may be
            # recorded, which is on a GPU alone.
            recorded, on_gpu = "CUDA graphs" in parts, next(self.model.parameters()).is_cuda
            self.optimizer = torch.optim.Adam(
                self.model.parameters(),
                betas=(0.9, 0.98),
                eps=1e-9,
                foreach=on_gpu or not recorded,
                capturable=on_gpu and recorded,
            )
        self.optimizer.param_groups[0]["lr"] = 1e-4
        self.precision = next((part for part in LOW if part in parts), "float32")
        # Plain PyTorch lets autocast cast weights one by one, and keep them.
        self.plain = not set(parts) & set(WITHOUT)
        self.low_weights = LowWeights(self.model, "float32" if self.plain else self.precision)
        self.loss = objective(self.model, "torch.compile" in parts, processes=1)
        self._rows = work.rows
        self._batches = [(batch.to(device), tokens) for batch, tokens in work.batches]
        self._captured: CapturedStep | None = None
        if "CUDA graphs" in parts:
            records = recorder or CudaGraphs(torch.device(device))
            samples = work.samples(device)
            self._captured = CapturedStep(samples, len(work.rows[0]), self._step, self.optimizer, records)

    def take(self, batch: Batch, tokens: int) -> Tensor:
        """One step; the loss, detached."""
        return self._step(batch, tokens).sums

    def take_number(self, number: int) -> Tensor:
        """The same on the workload's batch of that number, round and round."""
        if self._captured is not None:
            return self._captured(self._rows[number % len(self._rows)]).sums
        return self.take(*self._batches[number % len(self._batches)])

    @property
    def recorded(self) -> tuple[int, int]:
        """Shapes of batches that have a recording, and all that have come."""
        return (self._captured.recorded, self._captured.shapes) if self._captured else (0, 0)

    def warm_up(self) -> None:
        """Compile, record and have all that is made once, whatever batch comes."""
        for number in range((2 if self._captured is not None else 1) * len(self._batches)):
            self.take_number(number)
        wait(self.device)
        if (
            self._captured is not None and self._captured.failures
        ):  # steps that are not recorded are not to be timed so
            raise RuntimeError(self._captured.failures[0])

    def _step(self, batch: Batch, tokens: int, health: bool = False) -> Taken:
        with contextlib.ExitStack() as stack:
            for take_out in self.off:
                stack.enter_context(take_out())
            stack.enter_context(float32_products(self.device, self.precision))
            stack.enter_context(self.low_weights())
            with autocast(self.device, self.precision, keep_casts=self.plain):
                losses = self.loss(batch, health, tokens)
            losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(losses.total.detach(), {})


def configurations(with_compile: bool, device: str = "cpu") -> dict[str, list[str]]:
    """Plain PyTorch, each improvement alone, all together, in lower precision; on a GPU also recorded.

    On a GPU what tells most comes first: time may end before the rest.
    """
    plain: dict[str, list[str]] = {"plain PyTorch": []}
    alone = {f"+ {part}": [part] for part in WITHOUT if part not in ON_CPUS or device == "cpu"}
    if device == "cpu":
        named = plain | alone | {"all": list(WITHOUT), "all, bfloat16": [*WITHOUT, "bfloat16"]}
        return named | ({"all, torch.compile": [*WITHOUT, "torch.compile"]} if with_compile else {})

    def each(name: str, *parts: str) -> dict[str, list[str]]:
        """A configuration in each precision."""
        return {**{f"{name}, {kind}": [*parts, kind] for kind in LOW}, name: list(parts)}

    # The pairs that tell the kernels from the recording come before single launches.
    named = (
        plain | each("all, CUDA graphs", *WITHOUT, "CUDA graphs") | each("plain, CUDA graphs", "CUDA graphs")
    )
    named |= each("all", *WITHOUT) | {f"plain, {kind}": [kind] for kind in LOW} | alone
    if with_compile:
        named |= each("all, torch.compile", *WITHOUT, "torch.compile") | each(
            "plain, torch.compile", "torch.compile"
        )
        named |= each("all, torch.compile, CUDA graphs", *WITHOUT, "torch.compile", "CUDA graphs")
        named |= each("plain, torch.compile, CUDA graphs", "torch.compile", "CUDA graphs")
    return named
