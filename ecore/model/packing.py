"""Responses without their padding: work that is done word by word is done for words alone.

More than half of a batch's response positions are padding. Projections, norms, feed-forward layers and the vocabulary
loss take rows of words, one after the other; only attention sees them by response and position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecore.data.vocabulary import BOS, PAD


class Packing(NamedTuple):
    """The rows of T-word responses to B contexts that have words, R of the B * T.

    Rows beyond the words are padding. There is always one, the last: it is what every place reads that has no row, and
    no loss depends on it, so that its gradient is 0.

    Attributes:
        places: int64 [R], the place of each row among the flattened responses, none twice; words first, in order.
        rows_of: int64 [B * T], the row of each place.
        contexts: int64 [R], the context of each row.
        batch, length: B and T.
    """

    places: Tensor
    rows_of: Tensor
    contexts: Tensor
    batch: int
    length: int

    @classmethod
    def of(cls, response: Tensor, count: int) -> Packing:
        """Pack responses [B, T] of less than ``count`` words, into ``count`` rows."""
        words = response.flatten()  # [B * T]
        places = words.clamp(max=PAD + 1).argsort(descending=True, stable=True)[:count]  # [R]
        rows = torch.arange(count, device=response.device)  # [R]
        rows_of = torch.full_like(words, count - 1).index_copy(0, places, rows)
        batch, length = response.shape
        return cls(places, rows_of, places // length, batch, length)

    @property
    def columns(self) -> Tensor:
        """Return the position of each row in its response, int64 [R]."""
        return self.places % self.length

    def pack(self, x: Tensor) -> Tensor:
        """Return the rows [R, ...] of x [B, T, ...]."""
        return _Moved.apply(x.flatten(0, 1), self.places, self.rows_of)

    def unpack(self, x: Tensor) -> Tensor:
        """Return rows x [R, ...] as [B, T, ...]; places without one get the last."""
        return _Moved.apply(x, self.rows_of, self.places).unflatten(0, (self.batch, self.length))

    def spread(self, x: Tensor) -> Tensor:
        """Return x [B, D] of contexts for their responses' rows, [R, D]."""
        return _Spread.apply(x, self.contexts, self.rows_of)


class Padded(NamedTuple):
    """All rows of T-word responses to B contexts, R = B * T; methods as those of :class:`Packing`."""

    batch: int
    length: int

    def pack(self, x: Tensor) -> Tensor:
        """Return the rows [R, ...] of x [B, T, ...]."""
        return x.flatten(0, 1)

    def unpack(self, x: Tensor) -> Tensor:
        """Return rows x [R, ...] as [B, T, ...]."""
        return x.unflatten(0, (self.batch, self.length))

    def spread(self, x: Tensor) -> Tensor:
        """Return x [B, D] of contexts for their responses' rows, [R, D]."""
        return x[:, None].expand(-1, self.length, -1).flatten(0, 1)


class ResponseRows(NamedTuple):
    """The rows of words that a batch's responses are decoded in.

    Attributes:
        layout: of the rows, R in all; padded where leaving padding out would leave nothing out.
        before: int64, the word before each: [R] packed, [B, T] padded.
        targets: int64 [R], PAD where there is no word.
        contexts: int64 [R], the context of each.
    """

    layout: Packing | Padded
    before: Tensor
    targets: Tensor
    contexts: Tensor

    @classmethod
    def of(cls, response: Tensor, tokens: int | None) -> ResponseRows:
        """Return the rows of responses [B, T]; ``tokens``: their words, or any number over that, None: count them."""
        words = response.flatten()  # [B * T]
        before = shifted(response)  # [B, T]
        count = int((response != PAD).sum()) if tokens is None else tokens
        if count >= len(words):
            contexts = torch.arange(len(words), device=response.device) // response.shape[1]
            return cls(Padded(*response.shape), before, words, contexts)
        packing = Packing.of(response, count + 1)  # a row more than words
        return cls(packing, before.flatten()[packing.places], words[packing.places], packing.contexts)

    @property
    def packing(self) -> Packing | None:
        """Return the layout of packed rows; None where they are padded."""
        return self.layout if isinstance(self.layout, Packing) else None


def shifted(response: Tensor) -> Tensor:
    """Return the word before each word of responses [B, T]."""
    return F.pad(response[:, :-1], (1, 0), value=BOS)


class _Moved(torch.autograd.Function):
    """Rows in another order; the gradient comes back the same way.

    PyTorch would add gradients to zeros, in an order that is not always the same. Here each has one place to come from:
    that of rows without a place in the result is 0, as is that of places which read the last row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class _Spread(torch.autograd.Function):
    """Rows of contexts for each of their words; gradients are summed up in the words' order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, contexts: Tensor, rows_of: Tensor) -> Tensor:
        ctx.save_for_backward(rows_of)
        ctx.contexts = len(x)
        return x.index_select(0, contexts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows_of,) = ctx.saved_tensors
        return grad.index_select(0, rows_of).unflatten(0, (ctx.contexts, -1)).sum(1), None, None
