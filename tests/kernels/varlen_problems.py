"""Calls of varlen_attention for its tests: drawn tensors in each of its forms, and lengths in place of Sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels import Sequences, varlen_attention


def draw(
    form: str, rows: int, keys: int, heads=2, dim=5, value_dim=7, dtype=torch.float64, key_heads=None
) -> list[Tensor]:
    """Tensors of a call; values are as wide as keys where they lie side by side."""
    key_heads = heads if key_heads is None else key_heads
    shapes = {
        "three side by side": [(rows, 3, heads, dim)],
        "keys and values side by side": [(rows, heads, dim), (keys, 2, key_heads, dim)],
        "three tensors": [(rows, heads, dim), (keys, key_heads, dim), (keys, key_heads, value_dim)],
    }
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes[form]]


def given(leaves: Sequence[Tensor]) -> list[Tensor | None]:
    return [*leaves, *[None] * (3 - len(leaves))]


def run(leaves, lengths, key_lengths=None, **options) -> Tensor:
    sequences = Sequences.from_lengths(lengths)
    of_keys = None if key_lengths is None else Sequences.from_lengths(key_lengths)
    return varlen_attention(*given(leaves), sequences, of_keys, **options)
