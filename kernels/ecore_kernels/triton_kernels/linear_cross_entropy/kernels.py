"""Two passes over rows of logits: their sums, and their errors in place."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.tiles import exponent, number_of

VARYING = ("classes", "spread", "hole", "base_bits", "extra_bits")


@triton.jit(do_not_specialize=VARYING)
def _row_sums(
    logits,  # [n, V]
    maximum, inverse, mean,  # [n] each, written; mean may be None
    classes, spread, hole, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a row's maximum, one over its sum of exponentials, and the mean of all logits but the hole's.

    Shape tag: C = BLOCK classes, at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * classes
    number: tl.constexpr = maximum.dtype.element_ty
    most = tl.full([BLOCK], float("-inf"), number)  # [C]: for every lane, combined at the end
    powers = tl.zeros([BLOCK], number)
    total = tl.zeros([BLOCK], number)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)  # [C]
        x = tl.load(logits + column, mask=column < classes, other=float("-inf")).to(number)
        larger = tl.maximum(most, x)
        offset = tl.where(larger == float("-inf"), 0.0, larger)  # only minus infinity so far
        powers = powers * tl.exp2(exponent(most - offset)) + tl.exp2(exponent(x - offset))
        most = larger
        if mean is not None:
            total += tl.where((column < classes) & (column != hole), x, 0.0)
    whole = tl.max(most, 0)
    # A lane without a logit holds minus infinity, and adds nothing; a row of nothing else gives NaN, as a softmax does.
    lane = tl.where(most == float("-inf"), 0.0, powers * tl.exp2(exponent(most - whole)))
    powers_of_row = tl.where(whole == float("-inf"), float("nan"), tl.sum(lane, 0))
    tl.store(maximum + row, whole)
    tl.store(inverse + row, 1.0 / powers_of_row)
    if mean is not None:
        tl.store(mean + row, tl.sum(total, 0) / spread.to(number))


@triton.jit(do_not_specialize=VARYING)
def _row_errors(
    logits,  # [n, V], overwritten
    maximum, inverse, factor, target,  # [n] each
    classes, hole, base_bits: tl.int64, extra_bits: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK classes of a row, factor * softmax - goal.

    Shape tag: C = BLOCK classes.
    """
    blocks = tl.cdiv(classes, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [C]
    inside = column < classes
    logits += row * classes
    number: tl.constexpr = maximum.dtype.element_ty
    x = tl.load(logits + column, mask=inside, other=0.0).to(number)
    p = tl.exp2(exponent(x - tl.load(maximum + row))) * tl.load(inverse + row)
    error = tl.load(factor + row) * p
    error -= tl.where(column == hole, 0.0, number_of(base_bits, number))
    error -= tl.where(column == tl.load(target + row), number_of(extra_bits, number), 0.0)
    tl.store(logits + column, error.to(logits.dtype.element_ty), mask=inside)
