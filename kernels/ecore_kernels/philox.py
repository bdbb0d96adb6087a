"""Philox 4x32-10, the counter-based random numbers of every dropout here (Salmon et al., SC 2011).

A word depends on the seed and its counter only, not on the number of threads, the device or the order of the work. So
the backward computes a mask again, and no backend stores one. The C++ function is in csrc/philox.h, Triton's is
``tl.philox``; all give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

_WORD = 0xFFFFFFFF


def philox_words(
    seed: Tensor | int, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of a counter.

    Args:
        seed: 64 bits, the key: its low word is the key's first. An int, or a tensor of int64 that holds those bits.
        c0, c1, c2, c3: words of the counter; ints or int64 tensors that broadcast against each other. At least one of
            ``seed`` and these is a tensor.

    Returns:
        four words in 0 ... 2^32 - 1, int64 of the common shape.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    a, b = MULTIPLIERS
    for _ in range(ROUNDS):
        # Bits 32 ... 63 of the product. int64 has them too: it wraps, and copies of the sign are masked off.
        product, other = c0 * a, c2 * b
        c0, c1, c2, c3 = (
            ((other >> 32) & _WORD) ^ c1 ^ k0,
            other & _WORD,
            ((product >> 32) & _WORD) ^ c3 ^ k1,
            product & _WORD,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3  # type: ignore[return-value]  # one of the arguments is a tensor, and all meet it


def philox(
    seed: Tensor | int, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> Tensor:
    """The first word of a counter: see :func:`philox_words`."""
    return philox_words(seed, c0, c1, c2, c3)[0]


def threshold(p: float) -> int:
    """Return the smallest word that is kept by a dropout of probability ``p``: round(p * 2^32)."""
    return round(p * 2**32)


def kept(seed: Tensor | int, rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    """The elements [rows, columns] that a dropout keeps: bool, each with a chance of 1 - p.

    Element (row, column) has word ``column % 4`` of the counter ``(column // 4, row mod 2^32, row // 2^32, 0)``, and is
    kept where that is not below :func:`threshold`.
    """
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(-(-columns // 4), device=device)
    words = torch.stack(
        philox_words(seed, column, row & _WORD, row >> 32, 0), dim=-1
    )  # [rows, columns / 4, 4]
    return words.flatten(1)[:, :columns] >= threshold(p)


def keep_scale(p: float) -> float:
    """Return what an element that a dropout keeps is multiplied by: 1 / (1 - p); 0 where none is kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0
