"""Random words: the published answers, the same bits in PyTorch, C++ and Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ecore_kernels import native
from ecore_kernels.philox import philox, philox_words, threshold

# Of Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def counters() -> tuple[int, Tensor]:
    """A seed with its highest bit set, and [4, n] words of counters, large ones among them."""
    words = torch.randint(0, 2**32, (4, 1000), generator=torch.Generator().manual_seed(0))
    words[:, :10] %= 4
    return 0xFEDCBA9876543210, words


@pytest.mark.parametrize("known", KNOWN)
def test_pytorch_gives_the_published_words(known):
    counter, (low, high), expected = KNOWN[known]
    words = [torch.tensor(c) for c in counter]
    for seed in (high << 32 | low, torch.tensor(signed(high << 32 | low))):
        assert tuple(int(w) for w in philox_words(seed, *words)) == expected
        assert int(philox(seed, *words)) == expected[0]


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
@pytest.mark.parametrize("known", KNOWN)
def test_cpp_gives_the_published_words(known):
    counter, (low, high), expected = KNOWN[known]
    assert tuple(native._native.philox_words(high << 32 | low, counter)) == expected


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_cpp_gives_pytorchs_words():
    seed, words = counters()
    expected = torch.stack(philox_words(seed, *words), 1).tolist()
    found = [list(native._native.philox_words(seed, counter)) for counter in words.T.tolist()]
    assert found == expected


def test_words_broadcast():
    row, column = torch.arange(3)[:, None], torch.arange(5)
    words = philox(7, column, row, 0, 1)
    assert words.shape == (3, 5)
    assert words.dtype is torch.int64
    assert int(words[2, 4]) == int(philox(7, torch.tensor(4), 2, 0, 1))
    assert words.unique().numel() == 15


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_p_falls_below_the_threshold(p):
    dropped = philox(3, torch.arange(100_000), 0, 0, 0) < threshold(p)
    allowed = 4.0 * (p * (1.0 - p) / len(dropped)) ** 0.5
    assert abs(float(dropped.double().mean()) - p) <= allowed
