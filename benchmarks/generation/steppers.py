"""Ways to take a decoding step, improvements taken out one by one, and a check that all give the same logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ecore.data.batches import Batch
from ecore.data.vocabulary import BOS
from ecore.generation.cuda_graph import StaticCache
from ecore.model import ECore, Encoding
from ecore.model import decoder as decoder_module
from ecore.model import ecore as model_module
from ecore.model.decoder import Decoded, DecoderBlock, DecoderCache
from ecore.model.transformer import mean_scores
from ecore_kernels import QuantizedLinear

LOGITS_TOLERANCE = 1e-3


class Whole:
    """No cache: the decoder reads all that is said so far for each word."""

    def __init__(self, model: ECore) -> None:
        self.model, self.encode = model, model.encode

    def start(self, encoding: Encoding, max_length: int) -> Any:
        """Return what :meth:`step` reads, a class's own."""
        self.encoding = encoding
        self.said: list[Tensor] = []
        return self

    def step(self, words: Tensor, cache: Any) -> Tensor:
        self.said.append(words)
        model, encoding = self.model, self.encoding
        states, scores = model._decode(model.embedding.look_up(torch.stack(self.said, 1))[0], encoding)
        last = Decoded(states[:, -1:], None if scores is None else scores[:, -1:])
        return model._logits(last, encoding)[:, 0]


class Modules(Whole):
    """A cache, and steps through the model's own modules: a projection each for queries, keys and values."""

    clock: Callable[[str], contextlib.AbstractContextManager[None]] = staticmethod(
        lambda name: contextlib.nullcontext()
    )

    def start(self, encoding: Encoding, max_length: int) -> Modules:
        blocks = self._blocks = list(cast(Iterable[DecoderBlock], self.model.decoder.blocks))
        self.length = 0
        self.encoding = encoding
        self.mask = encoding.memory_mask[:, None, None, :]
        self.start_of_answer = self.model._bos_embedding(encoding)  # [B, D] or None
        self.cross = [block.cross_attention.keys_values(encoding.memory) for block in blocks]
        self.own = [[k.new_empty(*k.shape[:2], max_length, k.shape[3]) for k in pair] for pair in self.cross]
        guidance = self.model.decoder._guidance(encoding.guidance)
        self.guidance = (
            None if guidance is None else guidance.transpose(0, 1)[:, :, None]
        )  # [blocks, B, 1, D]
        return self

    def step(self, words: Tensor, cache: Any) -> Tensor:
        model = self.model
        if self.length == 0 and self.start_of_answer is not None:
            y = (model.embedding.position[0] + self.start_of_answer)[:, None]
        else:
            y = model.embedding(words[:, None], start=self.length)
        for i, block in enumerate(self._blocks):
            with self.clock("self-attention"):
                normed = block.self_norm(y)
                for kept, new in zip(self.own[i], block.self_attention.keys_values(normed), strict=True):
                    kept[:, :, self.length] = new[:, :, 0]
                seen = (kept[:, :, : self.length + 1] for kept in self.own[i])
                y = y + block.self_attention(block.self_attention.queries(normed), *seen)
            with self.clock("cross-attention"):
                queries = block.cross_attention.queries(block.cross_norm(y))
                attended = block.cross_attention(queries, *self.cross[i], self.mask)
                joined = block.join_context(attended)
                y = y + (joined if self.guidance is None else joined + self.guidance[i])
            with self.clock("feed-forward"):
                y = y + block.feed_forward(block.feed_forward_norm(y))
        self.length += 1
        with self.clock("output projection"):
            scores = mean_scores(queries, self.cross[-1][0]) if model.decoder.copies else None
            return model._logits(Decoded(model.decoder.norm(y), scores), self.encoding)[:, 0]


class Compiled(Whole):
    """The model's own step through torch.compile, on a cache of fixed shapes."""

    def __init__(self, model: ECore) -> None:
        super().__init__(model)
        self._step = torch.compile(model.step)

    def start(self, encoding: Encoding, max_length: int) -> DecoderCache:
        return StaticCache(self.model.start(encoding, max_length))

    def step(self, words: Tensor, cache: Any) -> Tensor:
        return self._step(words, cache)


def _linear(x: Tensor, weight: Tensor | QuantizedLinear, bias: Tensor) -> Tensor:
    return F.linear(x, weight.weight if isinstance(weight, QuantizedLinear) else weight, bias)


def _products() -> contextlib.AbstractContextManager[Any]:
    plain = contextlib.ExitStack()
    for module in (decoder_module, model_module):
        plain.enter_context(mock.patch.object(module, "project", _linear))
    return plain


def _choice() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(ECore, "_output_of_few", return_value=None)


def _plain_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias).transpose(1, 2).flatten(2)


def _attention() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(decoder_module, "attend", _plain_attention)


def _no_graphs() -> contextlib.AbstractContextManager[Any]:
    return mock.patch("ecore.generation.cuda_graph.step_graph", return_value=None)


WITHOUT: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "split products": _products,
    "choice in the product": _choice,
    "small attention": _attention,
    "CUDA graphs": _no_graphs,
}
"""Improvements on top of a lean step, and how each is taken out."""


def configurations(model: ECore, compiled: bool) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """By name: what :func:`generate` steps through and which of :data:`WITHOUT` are on."""
    names = [name for name in WITHOUT if name != "CUDA graphs" or model.device.type == "cuda"]
    found: dict[str, tuple[Any, tuple[str, ...]]] = {
        "no cache": (Whole(model), ()),
        "cache, modules": (Modules(model), ()),
        "lean step": (model, ()),
        **{f"lean step, {name}": (model, (name,)) for name in names},
        "all (what ecore does)": (model, tuple(names)),
    }
    if compiled:
        found["all, torch.compile"] = (Compiled(model), tuple(n for n in names if n != "CUDA graphs"))
    return found


@contextlib.contextmanager
def only(parts: Sequence[str]) -> Iterator[None]:
    """Take out every improvement of :data:`WITHOUT` but these."""
    with contextlib.ExitStack() as stack:
        for name, take_out in WITHOUT.items():
            if name not in parts:
                stack.enter_context(take_out())
        yield


def check(model: ECore, stepper: Any, batch: Batch, words: int = 4) -> None:
    """Refuse steps whose logits are not those of the whole response.

    Raises:
        SystemExit: they differ.
    """
    response = torch.randint(5, len(model.vocabulary), (len(batch.context), words), device=model.device)
    with torch.inference_mode():
        encoding = model.encode(batch)
        expected = model(batch._replace(response=response)).logits
        cache = stepper.start(encoding, words + 1)
        read = torch.cat([torch.full_like(response[:, :1], BOS), response[:, :-1]], dim=1)
        for i in range(words):
            try:
                torch.testing.assert_close(
                    stepper.step(read[:, i], cache),
                    expected[:, i],
                    rtol=LOGITS_TOLERANCE,
                    atol=LOGITS_TOLERANCE,
                )
            except AssertionError as error:
                raise SystemExit(f"word {i + 1} has not the logits of the whole response: {error}") from None
