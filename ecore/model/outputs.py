"""What a model's passes give."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ecore.model.pointer import Copyable


class Encoding(NamedTuple):
    """A batch of contexts, encoded and perceived.

    Attributes:
        memory: [B, S, D], h_X of the words and of the related words behind them.
        memory_mask: [B, S] bool.
        guidance: [B, D], the node sum of Eq. 24 (or what an ablation puts in its place, or None).
        perception: h^g, [B, P].
        main: h^m, [B, P], logits of the emotion categories.
        attention: h_emo, [B, P].
        relevant: [B, P] bool, V': the co-occurring emotions.
        gate: sigma(W_e h^g), [B, P].
        copyable: the context's words for copying, [B, S]; None without.

    Under strategy "none" those from ``guidance`` to ``gate`` are None.
    """

    memory: Tensor
    memory_mask: Tensor
    guidance: Tensor | None
    perception: Tensor | None = None
    main: Tensor | None = None
    attention: Tensor | None = None
    relevant: Tensor | None = None
    gate: Tensor | None = None
    copyable: Copyable | None = None


class ECoreOutput(NamedTuple):
    """logits [B, T, V] of the response's words (with copying their log-probabilities), and the encoding."""

    logits: Tensor
    encoding: Encoding


class Scores(NamedTuple):
    """nll [B], summed over each response's words, without label smoothing; tokens [B]; the encoding."""

    nll: Tensor
    tokens: Tensor
    encoding: Encoding
