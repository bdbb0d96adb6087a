"""varlen_attention keeps sequences apart: neither others, nor threads, nor what is not finite there change a result."""

from __future__ import annotations

import math

import pytest
import torch

from ecore_kernels import native
from tests.kernels.varlen_problems import draw, run

needs_native = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])


@needs_native
@pytest.mark.parametrize("lengths", [[9, 0, 30, 4, 75, 2], [700, 12]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_again_and_on_any_number_of_threads(lengths, causal):
    leaves = draw("three side by side", sum(lengths), 0, 3, 8, dtype=torch.float32)

    def once():
        output = run(leaves, lengths, causal=causal, backend="native")
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(once())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_has_the_bits_that_it_has_alone(causal):
    lengths = [80, 3, 0, 330]
    leaves = draw("three side by side", sum(lengths), 0, 2, 8)
    output = run(leaves, lengths, causal=causal, backend="native")
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves)
    for rows, heard, right in zip(*(x.split(lengths) for x in (*leaves, output, gradient)), strict=True):
        alone = rows.detach().requires_grad_()
        found = run([alone], [len(rows)], causal=causal, backend="native")
        assert torch.equal(found, heard)
        assert torch.equal(torch.autograd.grad(found.square().sum(), alone)[0], right)


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_sequence(backend, bad):
    """In queries, keys, values and upstream gradients; the memory of a call before it does no harm, either."""
    lengths = [5, 80, 0, 7]
    leaves = draw("three side by side", sum(lengths), 0)
    upstream = torch.randn(sum(lengths), 2, 5, dtype=torch.float64)
    output = run(leaves, lengths, causal=True, backend=backend)
    clean = output, *torch.autograd.grad(output, leaves, upstream)
    for part in range(4):
        dirty, sent = leaves[0].detach().clone(), upstream.clone()
        (dirty[:, part] if part < 3 else sent)[7:85:6] = bad
        dirty.requires_grad_()
        output = run([dirty], lengths, causal=True, backend=backend)
        found = output, *torch.autograd.grad(output, dirty, sent)
        assert not all(x.isfinite().all() for x in found)
        for x, right in zip(found, clean, strict=True):
            for rows in (slice(0, 5), slice(85, None)):
                torch.testing.assert_close(x[rows], right[rows], rtol=1e-12, atol=1e-12)
                assert backend == "reference" or torch.equal(x[rows], right[rows])
    again = run(leaves, lengths, causal=True, backend=backend)
    assert torch.equal(again, clean[0])
    assert torch.equal(torch.autograd.grad(again, leaves, upstream)[0], clean[1])


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 5, 6, 71, 73, 321, 399])
def test_what_is_not_finite_does_not_reach_earlier_rows(at, bad, backend):
    """Rows before it hear the same, to the bit; the fused kernel's gradients of their queries are the same, too."""
    leaves = draw("three side by side", 400, 0)
    upstream = torch.randn(400, 2, 5, dtype=torch.float64)
    output = run(leaves, [400], causal=True, backend=backend)
    (gradient,) = torch.autograd.grad(output, leaves, upstream)
    for part in range(3):
        dirty = leaves[0].detach().clone()
        dirty[at, part] = bad
        dirty.requires_grad_()
        found = run([dirty], [400], causal=True, backend=backend)
        if backend == "reference":  # the order of a product's sums depends on the threads
            torch.testing.assert_close(found[:at], output[:at], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(found[:at], output[:at])
        assert not found[at:].isfinite().all()
        if backend == "reference":
            continue
        (got,) = torch.autograd.grad(found, dirty, upstream)
        assert torch.equal(got[:at, 0], gradient[:at, 0])
