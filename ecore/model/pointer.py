"""Copying words of the context: the pointer-generator (See et al., 2017, Eqs. 8 and 9), option ``copy``.

    P(w) = p softmax(logits)_w + (1 - p) sum of a_i over the context's places i with word w

``p = sigmoid(gate)`` is the probability that a word is generated; ``a`` is a softmax over places of the context.
Special words cannot be copied, so neither can words outside the vocabulary; a context without any other word has p = 1.

Places are summed by word first: a word's *slot* is its first place. Everything then happens at slots, and
P differs from p softmax(logits) only there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ecore.data.vocabulary import SPECIAL_WORDS
from ecore_kernels.copying import mixed as copying_mixed


class Copyable(NamedTuple):
    """Contexts as copying sees them: words' ids [..., S], and the slot of each place [..., S], both int64."""

    words: Tensor
    slots: Tensor

    @classmethod
    def of(cls, words: Tensor) -> Copyable:
        """From ids [B, S]; special words, PAD among them, are not copied."""
        places = torch.arange(words.shape[1], device=words.device)
        ordered, order = words.sort(dim=1, stable=True)
        begins = torch.ones_like(ordered, dtype=torch.bool)
        begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        run = torch.where(begins, places, 0).cummax(1).values  # where the word's run begins
        return cls(words, torch.empty_like(order).scatter_(1, order, order.gather(1, run)))

    @property
    def allowed(self) -> Tensor:
        """Return True at places whose word can be copied, bool [..., S]."""
        return self.words >= len(SPECIAL_WORDS)

    def rows(self, index: Tensor) -> Copyable:
        """Some contexts, in that order: int64 [N]."""
        return Copyable(self.words[index], self.slots[index])


class Copying(NamedTuple):
    """Inputs of copying for N response words.

    ``gate`` [N]: p's logit; infinite where the context has nothing to copy. ``scores`` [N, S]: a's logits, minus
    infinity where there is nothing to copy. ``context``: of each, [N, S].
    """

    gate: Tensor
    scores: Tensor
    context: Copyable


class Pointer(nn.Module):
    """The gate; a's scores are the last decoder block's attention to the context, averaged over its heads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, 1)

    def forward(self, states: Tensor, scores: Tensor, context: Copyable) -> Copying:
        """states [N, D], s_t of Eq. 15; scores [N, S]; context [N, S]."""
        allowed = context.allowed
        gate = self.gate(states).squeeze(-1).masked_fill(~allowed.any(-1), torch.inf)
        return Copying(gate, scores.masked_fill(~allowed, -torch.inf), context)


def mixed(logits: Tensor, copying: Copying) -> Tensor:
    """log P [N, V] of the mixture, from the generator's logits [N, V]; differentiable."""
    return copying_mixed(logits, copying.gate, copying.scores, *copying.context)
