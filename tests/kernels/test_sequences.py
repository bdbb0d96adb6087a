"""Sequences: made of lengths or offsets, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels import Sequences

OFFSETS = torch.tensor([0, 4, 9])


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_sequences(kind):
    by_lengths = Sequences.from_lengths(torch.tensor([3, 0, 5], dtype=kind))
    by_offsets = Sequences.from_offsets(torch.tensor([0, 3, 3, 8], dtype=kind))
    for made in (by_lengths, by_offsets, Sequences.from_lengths([3, 0, 5]), by_lengths.to("cpu")):
        assert made.offsets.dtype is torch.int64
        assert made.offsets.tolist() == [0, 3, 3, 8]
        assert made.lengths.tolist() == [3, 0, 5]
        assert (made.rows, made.longest, len(made)) == (8, 5, 3)
    assert by_lengths.to("meta").offsets.device.type == "meta"


def test_no_sequences():
    for made in (Sequences.from_lengths([]), Sequences.from_offsets([0])):
        assert (made.offsets.tolist(), made.rows, made.longest, len(made)) == ([0], 0, 0, 0)


REFUSED = {
    "lengths: expected no negative ones, got -2": lambda: Sequences.from_lengths([3, -2]),
    "lengths: expected integers [B], got torch.float32 [2]": lambda: Sequences.from_lengths(torch.ones(2)),
    "lengths: expected integers [B], got torch.bool [2]": lambda: Sequences.from_lengths([True, False]),
    "lengths: expected integers [B], got torch.int64 [1, 2]": lambda: Sequences.from_lengths(
        torch.ones(1, 2, dtype=torch.int64)
    ),
    "offsets: expected integers [B], got torch.float32 [2]": lambda: Sequences.from_offsets(torch.zeros(2)),
    "offsets: expected B + 1 numbers from 0 on, got [1] first": lambda: Sequences.from_offsets([1, 3]),
    "offsets: expected B + 1 numbers from 0 on, got [] first": lambda: Sequences.from_offsets([]),
    "lengths: expected no negative ones, got -1": lambda: Sequences.from_offsets([0, 4, 3]),
    "offsets: expected int64 [B + 1], got torch.int32 [3]": lambda: Sequences(OFFSETS.int(), 9, 5),
    "offsets: expected int64 [B + 1], got torch.int64 [0]": lambda: Sequences(OFFSETS[:0], 0, 0),
    "offsets: expected int64 [B + 1], got torch.int64 []": lambda: Sequences(OFFSETS[0], 0, 0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_sequences(message):
    with pytest.raises(ValueError) as raised:
        REFUSED[message]()
    assert str(raised.value) == f"Sequences: {message}"
