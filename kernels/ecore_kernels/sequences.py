"""Sequences of different lengths, their rows one after the other in a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """B sequences whose rows lie one after the other, R in all; make it by :meth:`from_lengths`.

    Attributes:
        offsets: int64 [B + 1]: sequence b has the rows ``offsets[b]`` to ``offsets[b + 1] - 1``. What other libraries
            call ``cu_seqlens``.
        rows: R, the last of them.
        longest: the rows of the longest sequence, or any number over that.
    """

    offsets: Tensor
    rows: int
    longest: int

    def __post_init__(self) -> None:
        """Raise ValueError unless the offsets are int64 [B + 1]: a kernel reads them as they are."""
        offsets = self.offsets
        if offsets.dtype is not torch.int64 or offsets.dim() != 1 or not len(offsets):
            got = f"{offsets.dtype} {list(offsets.shape)}"
            raise ValueError(f"Sequences: offsets: expected int64 [B + 1], got {got}")

    @classmethod
    def from_lengths(cls, lengths: Tensor | Sequence[int]) -> Sequences:
        """Make sequences of these lengths, [B] of any integer type; they may be 0.

        Raises:
            ValueError: another shape or type, or a negative length. On a GPU this check waits for the device once.
        """
        counts = _as_tensor("lengths", lengths)
        _check_integers("lengths", counts)
        if len(counts) and int(counts.min()) < 0:
            raise ValueError(f"Sequences: lengths: expected no negative ones, got {int(counts.min())}")
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return cls(offsets, int(offsets[-1]), int(counts.max()) if len(counts) else 0)

    @classmethod
    def from_offsets(cls, offsets: Tensor | Sequence[int]) -> Sequences:
        """Make sequences that begin at these rows: [B + 1] of any integer type, from 0 to R.

        Raises:
            ValueError: another shape or type, or numbers that do not ascend from 0. On a GPU this check waits for the
                device once.
        """
        offsets = _as_tensor("offsets", offsets)
        _check_integers("offsets", offsets)
        if not len(offsets) or int(offsets[0]) != 0:
            raise ValueError(
                f"Sequences: offsets: expected B + 1 numbers from 0 on, got {offsets[:1].tolist()} first"
            )
        return cls.from_lengths(offsets.to(torch.int64).diff())

    @property
    def lengths(self) -> Tensor:
        """Return the rows of each sequence, int64 [B]."""
        return self.offsets.diff()

    def to(self, device: torch.device | str) -> Sequences:
        """Return the sequences with their offsets on a device."""
        return type(self)(self.offsets.to(device), self.rows, self.longest)

    def __len__(self) -> int:
        return len(self.offsets) - 1


def _as_tensor(name: str, numbers: Tensor | Sequence[int]) -> Tensor:
    """Return numbers as a tensor; an empty list as one of integers, where torch makes float32 of it."""
    if isinstance(numbers, Tensor):
        return numbers
    if isinstance(numbers, str) or not hasattr(numbers, "__len__"):
        raise ValueError(f"Sequences: {name}: expected integers [B], got {type(numbers).__name__}")
    return torch.tensor(numbers) if len(numbers) else torch.zeros(0, dtype=torch.int64)


def _check_integers(name: str, numbers: Tensor) -> None:
    kind = numbers.dtype
    if numbers.dim() != 1 or kind.is_floating_point or kind.is_complex or kind is torch.bool:
        raise ValueError(f"Sequences: {name}: expected integers [B], got {kind} {list(numbers.shape)}")
