"""A decoder step as a CUDA graph: one launch instead of about a hundred."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ecore.data.vocabulary import PAD
from ecore.model.base import EmpatheticModel
from ecore.model.decoder import DecoderCache
from ecore.model.ecore import ECore
from ecore.model.pointer import Copyable

_KEPT = 8
"""Graphs kept for each model, the latest ones: each holds a cache and logits."""
_ROOM, _CONTEXT = 8, 64
"""Room for words and the contexts' length are rounded up to these, so that a graph serves many calls."""


class StaticCache(DecoderCache):
    """A cache whose tensors stay where they are and whose length is known on the device too.

    Steps attend to all of its room, masked. It is for steps after the first. Contexts may branch, as many ways as
    before; :meth:`select` would move tensors.
    """

    def __init__(self, cache: DecoderCache) -> None:
        room, context = _rounded(cache)
        memory = cache.memory.new_zeros(*cache.memory.shape[:4], context, cache.memory.shape[5])
        mask = memory.new_zeros(cache.contexts, memory.shape[3], 1, context)
        weights = [
            w._replace(
                query_key_value=(
                    torch.empty_like(w.query_key_value[0]),
                    torch.empty_like(w.query_key_value[1]),
                )
            )
            for w in cache.weights
        ]
        guidance = None if cache.guidance is None else torch.empty_like(cache.guidance)
        copyable = cache.copyable
        if copyable is not None:
            ids = copyable.words.new_zeros(cache.contexts, context)
            copyable = Copyable(ids, ids.clone())
        super().__init__(memory, mask, guidance, weights, room, copyable)
        self.width = cache.width
        self.keys_values = memory.new_zeros(*cache.keys_values.shape[:4], room, memory.shape[5])
        self._places = torch.arange(room, device=memory.device)
        self._position = self._places[:1].clone()
        self._unseen = memory.new_zeros(room)
        self.load(cache)

    def load(self, cache: DecoderCache) -> None:
        """Become ``cache``, of contexts and room that round to the same."""
        filled, context = cache.length, cache.memory.shape[4]
        # What is masked is set to 0 too: 0 times what an earlier call left there might be NaN.
        self.keys_values[..., filled:, :] = 0.0
        self.keys_values[..., :filled, :] = cache.keys_values[..., :filled, :]
        self.memory[..., context:, :] = 0.0
        self.memory[..., :context, :] = cache.memory
        assert self.mask is not None  # __init__ makes one
        self.mask.fill_(-torch.inf)
        self.mask[..., :context] = 0.0 if cache.mask is None else cache.mask
        if self.guidance is not None and cache.guidance is not None:
            self.guidance.copy_(cache.guidance)
        if self.copyable is not None and cache.copyable is not None:
            for mine, given, rest in zip(self.copyable, cache.copyable, (PAD, 0), strict=True):
                mine[:, context:] = rest
                mine[:, :context] = given
        for block, other in zip(self.weights, cache.weights, strict=True):
            for target, source in zip(block.query_key_value, other.query_key_value, strict=True):
                target.copy_(source)
        self.length = filled
        self._position.fill_(filled)
        self._unseen.fill_(-torch.inf)
        self._unseen[: filled + 1] = 0.0

    @property
    def position(self) -> Tensor:  # type: ignore[override]  # indexes the same way
        """Index of the word that the next step reads, int64 [1]."""
        return self._position

    def append(self, block: int, keys_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.keys_values[block].index_copy_(3, self._position, keys_values.unsqueeze(3))
        keys, values = self.keys_values[block].unbind(0)
        return keys, values, self._unseen.view(1, 1, 1, -1)

    def advance(self) -> None:
        self.length += 1
        self._position += 1
        self._unseen.masked_fill_(self._places == self._position, 0.0)


class StepGraph:
    """``model.step`` on a :class:`StaticCache`, captured.

    Attributes:
        cache: where a call reads and writes.
    """

    def __init__(self, model: ECore, cache: DecoderCache) -> None:
        self.cache = StaticCache(cache)
        self._word_ids = torch.zeros(
            cache.keys_values.shape[2], dtype=torch.int64, device=cache.keys_values.device
        )
        with torch.cuda.device(cache.keys_values.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # warm up, so that no library sets itself up during the capture
                for _ in range(3):
                    model.step(self._word_ids, self.cache)
                    self.cache.load(cache)
            torch.cuda.current_stream().wait_stream(stream)
            self._cuda_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._cuda_graph):
                self._logits = model.step(self._word_ids, self.cache)
        self.cache.load(cache)

    def __call__(self, word_ids: Tensor) -> Tensor:
        """Logits [B, V] of the next word after ``word_ids`` [B]; the next call overwrites them."""
        self._word_ids.copy_(word_ids)
        self._cuda_graph.replay()
        self.cache.length += 1
        return self._logits


_graphs: WeakKeyDictionary[ECore, OrderedDict[object, StepGraph | None]] = WeakKeyDictionary()


def step_graph(model: EmpatheticModel, cache: Any) -> StepGraph | None:
    """The graph of a step on ``cache``, which is copied into the graph's own; None where steps run without one.

    A capture takes as long as some ten steps, so a shape has to come twice before it gets one. Under autocast
    there is none: its copies of the weights would not outlive the capture.
    """
    if not isinstance(model, ECore) or not isinstance(cache, DecoderCache):  # a pre-trained backbone's
        return None
    if cache.output is not None:  # weights of few bits, which are made again when the model's change
        return None
    if torch.is_autocast_enabled(cache.keys_values.device.type):
        return None
    parts = [
        part for part in (model.embedding, model.decoder, model.output, model.pointer) if part is not None
    ]
    # A graph reads the weights where they lay when it was captured.
    places = tuple(x.data_ptr() for part in parts for x in (*part.parameters(), *part.buffers()))
    key = (cache.contexts, cache.width, *_rounded(cache), cache.keys_values.dtype, places)
    graphs = _graphs.setdefault(model, OrderedDict())
    if key not in graphs:
        graphs[key] = None
        step = None
    else:
        step = graphs[key]
        if step is None:
            step = graphs[key] = StepGraph(model, cache)
        else:
            step.cache.load(cache)
    graphs.move_to_end(key)
    while len(graphs) > _KEPT:
        graphs.popitem(last=False)
    return step


def _rounded(cache: DecoderCache) -> tuple[int, int]:
    """Room for words and length of the contexts, rounded up."""
    room, context = cache.keys_values.shape[4], cache.memory.shape[4]
    return -(-room // _ROOM) * _ROOM, -(-context // _CONTEXT) * _CONTEXT
