"""Triton's random words are those of ecore_kernels.philox."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels.philox import philox
from tests.kernels.test_philox import counters, signed

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit(do_not_specialize=("count",))
def _words(seed, counter, words, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < count
    c0, c1, c2, c3 = (
        tl.load(counter + at, mask=inside, other=0),
        tl.load(counter + count + at, mask=inside, other=0),
        tl.load(counter + 2 * count + at, mask=inside, other=0),
        tl.load(counter + 3 * count + at, mask=inside, other=0),
    )
    first, _, _, _ = tl.philox(tl.load(seed), c0, c1, c2, c3)
    tl.store(words + at, first, mask=inside)


def test_bits(device):
    seed, words = counters()
    as_int32 = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).to(device)
    found = torch.empty(words.shape[1], dtype=torch.int32, device=device)
    _words[(1,)](torch.tensor(signed(seed), device=device), as_int32, found, words.shape[1], BLOCK=1024)
    assert torch.equal(found.cpu().long() & 0xFFFFFFFF, philox(seed, *words))
