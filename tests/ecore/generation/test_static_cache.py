"""Steps from a cache of fixed size, and the CUDA graphs that repeat them."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from ecore.data.vocabulary import BOS
from ecore.generation.cuda_graph import StaticCache, step_graph
from ecore.generation.decoding import Decoding
from ecore.generation.search import _Steps, generate
from ecore.model import ECore
from tests.ecore.generation.dialogues import CONTEXTS, real_batch


def step_both(real: ECore, cache: Any, static: StaticCache, words: torch.Tensor) -> None:
    expected = real.step(words, cache)
    torch.testing.assert_close(real.step(words, static), expected)


@torch.no_grad()
def test_static_cache_steps_as_the_growing_one(real: ECore) -> None:
    """It holds more room and more context than asked, and what a former call left there."""
    old = real.start(real.encode(real_batch(real, CONTEXTS[1::2])), 11)
    old.branch(torch.zeros(2, 3, dtype=torch.int64))
    static = StaticCache(old)
    static.keys_values.fill_(math.nan)
    static.memory.fill_(math.nan)
    cache = real.start(real.encode(real_batch(real, CONTEXTS[::2])), 9)
    real.step(torch.full((2,), BOS), cache)
    cache.branch(torch.zeros(2, 3, dtype=torch.int64))
    assert cache.keys_values.shape[4] < static.keys_values.shape[4]
    assert cache.memory.shape[4] < static.memory.shape[4]
    static.load(cache)
    held = [static.keys_values.data_ptr(), static.memory.data_ptr(), static.mask.data_ptr()]
    for i in range(4):
        step_both(real, cache, static, torch.tensor([5, 6, 7, 8, 9, 10]) + i)
        parents = torch.tensor([[2, 0, 0], [1, 1, 2]])
        cache.branch(parents)
        static.branch(parents)
    assert static.length == cache.length == int(static.position)
    assert held == [static.keys_values.data_ptr(), static.memory.data_ptr(), static.mask.data_ptr()]


@torch.no_grad()
def test_beams_share_their_context(real: ECore) -> None:
    cache = real.start(real.encode(real_batch(real, CONTEXTS)), 4)
    memory = cache.memory.data_ptr()
    real.step(torch.full((4,), BOS), cache)
    cache.branch(torch.zeros(4, 5, dtype=torch.int64))
    assert (cache.memory.shape[2], cache.keys_values.shape[2], cache.memory.data_ptr()) == (4, 20, memory)
    cache.select(torch.tensor([3, 1]))
    assert (cache.memory.shape[2], cache.keys_values.shape[2]) == (2, 10)


class Uncaptured:
    """A StepGraph that steps eagerly: what surrounds a capture, on any machine."""

    made = 0

    def __init__(self, model: ECore, cache: Any) -> None:
        self.model, self.cache = model, StaticCache(cache)
        Uncaptured.made += 1

    def __call__(self, words: torch.Tensor) -> torch.Tensor:
        return self.model.step(words, self.cache)


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_answers_from_a_static_cache(real: ECore, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    decoding = Decoding(method, seed=4, max_length=12, **({"beams": 3} if method == "beam" else {}))
    turns = [CONTEXTS, CONTEXTS[::-1], CONTEXTS[:2], CONTEXTS[2:], CONTEXTS]
    expected = [generate(real, real_batch(real, contexts), decoding) for contexts in turns]
    monkeypatch.setattr(_Steps, "waits", True)
    monkeypatch.setattr("ecore.generation.search.LOOK_EVERY", 3)
    monkeypatch.setattr("ecore.generation.cuda_graph.StepGraph", Uncaptured)
    monkeypatch.setattr("ecore.generation.cuda_graph._graphs", WeakKeyDictionary())
    Uncaptured.made = 0
    assert [generate(real, real_batch(real, contexts), decoding) for contexts in turns] == expected
    assert Uncaptured.made == 2  # of four contexts and of two, each at its second call


def test_graphs_follow_the_weights_and_are_few(real: ECore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecore.generation.cuda_graph.StepGraph", Uncaptured)
    monkeypatch.setattr("ecore.generation.cuda_graph._graphs", graphs := WeakKeyDictionary())
    model, batch = copy.deepcopy(real), real_batch(real, CONTEXTS)
    cache = model.start(model.encode(batch), 9)
    assert step_graph(model, cache) is None
    first = step_graph(model, cache)
    assert step_graph(model, model.start(model.encode(batch), 16)) is first  # the same room, rounded
    model.output.weight = torch.nn.Parameter(model.output.weight.clone())
    assert step_graph(model, cache) is None
    assert step_graph(model, cache) is not first
    with torch.autocast("cpu"):
        assert step_graph(model, cache) is None
    for room in range(1, 200, 8):
        step_graph(model, model.start(model.encode(batch), room))
    assert len(graphs[model]) == 8
    del model, first
    gc.collect()
    assert len(graphs) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_length=13),
        Decoding("beam", beams=3, max_length=13),
        Decoding("sample", seed=4, top_p=0.9),
    ],
    ids=lambda decoding: decoding.method,
)
def test_graphs_answer_as_the_cpu_does(real: ECore, decoding: Decoding) -> None:
    """The first call steps eagerly, the second captures, the third and those on new weights replay."""
    cuda = copy.deepcopy(real).cuda()
    for _ in range(2):
        for contexts in (CONTEXTS, CONTEXTS[::-1], CONTEXTS, CONTEXTS[::-1]):
            batch = real_batch(real, contexts)
            assert generate(cuda, batch.to("cuda"), decoding) == generate(real, batch, decoding)
        with torch.no_grad():  # in place: a graph has to see it
            real.decoder.blocks[0].self_attention.query.weight.mul_(0.5)
            cuda.decoder.blocks[0].self_attention.query.weight.mul_(0.5)
    with torch.no_grad():
        real.decoder.blocks[0].self_attention.query.weight.mul_(4.0)


@pytest.mark.gpu
@torch.inference_mode()
def test_graph_replays_the_eager_step(real: ECore) -> None:
    cuda = copy.deepcopy(real).cuda()
    words = torch.tensor([5, 6, 7, 8], device="cuda")
    for turn in range(4):
        cache = cuda.start(cuda.encode(real_batch(real, CONTEXTS).to("cuda")), 9)
        cuda.step(words + turn, cache)
        graph = step_graph(cuda, cache)
        assert (graph is None) == (turn == 0)
        for i in range(5 if graph else 0):
            torch.testing.assert_close(graph(words + i), cuda.step(words + i, cache))
