"""Results of a model's passes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ecore.errors import InputError
from ecore.model.packing import Packing, Padded
from ecore.model.perceiver import Perceived
from ecore.model.pointer import Copyable


class Encoding(NamedTuple):
    """A batch of contexts, encoded and perceived.

    Attributes:
        memory: [B, S, D], h_X of the words and of the related words behind them.
        memory_mask: [B, S] bool.
        layout: the rows of the memory that have words; None where they are not known.
        perceived: their emotions; None where the model predicts none.
        copyable: the context's words for copying, [B, S]; None without.
        losses: of the encoding itself, by name: weighted batch averages; None where the model has none.
    """

    memory: Tensor
    memory_mask: Tensor
    perceived: Perceived | None = None
    copyable: Copyable | None = None
    losses: dict[str, Tensor] | None = None
    layout: Packing | Padded | None = None

    @property
    def guidance(self) -> Tensor | None:
        """The guidance of the response, [B, D]; None without a graph."""
        return None if self.perceived is None else self.perceived.guidance


class ECoreOutput(NamedTuple):
    """logits [B, T, V] of the response's words (with copying their log-probabilities), and the model's encoding."""

    logits: Tensor
    encoding: Any


class Scores(NamedTuple):
    """nll [B], summed over each response's words, without label smoothing; tokens [B]; the model's encoding."""

    nll: Tensor
    tokens: Tensor
    encoding: Any


def expect_finite(values: Tensor, what: str) -> None:
    """Check that a model's ``values`` are numbers; minus infinity is one, of what cannot be.

    Raises:
        InputError: NaN or infinity, which no answer or score can be made from.
    """
    if not bool((values < math.inf).all()):
        raise InputError(f"{what} are not finite: the model's weights are damaged, or its training diverged")
