"""Texts without their padding: work that is done word by word is done for words alone.

More than half of a batch's response positions are padding, and one in twelve of its contexts'. Projections, norms,
feed-forward layers and the vocabulary loss take rows of words, one after the other. So does attention on a CPU;
elsewhere it sees them by text and position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecore.data.vocabulary import BOS, PAD
from ecore_kernels import Sequences, native
from ecore_kernels.backends import named


class Packing(NamedTuple):
    """The rows of B texts of up to T words that have words, R of the B * T.

    Rows beyond the words are padding. There is always one, the last: it is what every place reads that has no row, and
    no loss depends on it, so that its gradient is 0.

    Attributes:
        places: int64 [R], the place of each row among the flattened texts, none twice; words first, in order.
        rows_of: int64 [B * T], the row of each place.
        contexts: int64 [R], the text of each row.
        batch, length: B and T.
        sequences: the texts and behind them the padding, B + 1 sequences, for attention among rows; None where
            attention is by text and position.
    """

    places: Tensor
    rows_of: Tensor
    contexts: Tensor
    batch: int
    length: int
    sequences: Sequences | None

    @classmethod
    def of(cls, mask: Tensor, count: int) -> Packing:
        """Pack texts of less than ``count`` words into ``count`` rows; mask [B, T] bool: True where there is a word."""
        there = mask.flatten()  # [B * T]
        places = there.to(torch.uint8).argsort(descending=True, stable=True)[:count]  # [R]
        rows = torch.arange(count, device=mask.device)  # [R]
        rows_of = torch.full_like(there, count - 1, dtype=torch.int64).index_copy(0, places, rows)
        batch, length = mask.shape
        sequences: Sequences | None = None
        if attends_among_rows(mask):
            offsets = F.pad(mask.sum(1).cumsum(0), (1, 1))  # [B + 2]
            offsets[-1] = count
            sequences = Sequences(offsets, count, max(length, count - int(offsets[-2])))
        return cls(places, rows_of, places // length, batch, length, sequences)

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
    """All rows of B texts of T words, R = B * T; methods as those of :class:`Packing`."""

    batch: int
    length: int

    @property
    def sequences(self) -> None:
        """Return None: attention is by text and position."""

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
        packing = Packing.of(response != PAD, count + 1)  # a row more than words
        return cls(packing, before.flatten()[packing.places], words[packing.places], packing.contexts)

    @property
    def packing(self) -> Packing | None:
        """Return the layout of packed rows; None where they are padded."""
        return self.layout if isinstance(self.layout, Packing) else None


def attends_among_rows(x: Tensor) -> bool:
    """Return whether attention takes rows as they are where x is; elsewhere PyTorch's needs padding."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and named() in (None, "native")
        and native.available()
    )


def layout_of(mask: Tensor) -> Packing | Padded:
    """Return the rows of contexts' words; mask [B, S] bool. They are packed where attention takes rows as they are."""
    count = int(mask.sum()) if attends_among_rows(mask) else mask.numel()
    return Packing.of(mask, count + 1) if count < mask.numel() else Padded(*mask.shape)


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
