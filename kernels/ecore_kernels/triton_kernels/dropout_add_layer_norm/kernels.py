"""Dropout, residual and LayerNorm: forward and backward. Shape tags: D = the row's width, padded to a power of two."""

from __future__ import annotations

import triton
import triton.language as tl

from ecore_kernels.triton_kernels.tiles import number_of

VARYING = ("rows", "size", "threshold", "scale_bits", "eps_bits", "rows_a_program")


@triton.jit
def _kept(seed, row, threshold, TILE: tl.constexpr):
    """The elements of a row that are kept, [D]: see ecore_kernels.philox.kept."""
    counter = tl.arange(0, TILE // 4).to(tl.uint32)  # [D / 4]
    at = tl.zeros([TILE // 4], tl.int64) + row
    near, far = (at & 0xFFFFFFFF).to(tl.uint32), (at >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), counter, near, far, tl.zeros([TILE // 4], tl.uint32))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TILE])  # word column % 4 at each column
    return words.to(tl.int64) >= threshold


@triton.jit(do_not_specialize=VARYING)
def _forward(
    x, residual, normed, total,  # [rows, D] each
    saved,  # [2, rows]
    weight, bias, seed,  # [D], [D], scalar; None: 1, 0, nothing is dropped
    rows, size, threshold: tl.int64, scale_bits: tl.int64, eps_bits: tl.int64, TILE: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    number: tl.constexpr = saved.dtype.element_ty
    column = tl.arange(0, TILE)  # [D]
    inside = column < size
    at = row * size + column
    value = tl.load(x + at, mask=inside, other=0.0).to(number)
    if seed is not None:
        value = tl.where(_kept(seed, row, threshold, TILE), value * number_of(scale_bits, number), 0.0)
    value += tl.load(residual + at, mask=inside, other=0.0).to(number)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=inside)
    count = size.to(number)
    mean = tl.sum(value, 0) / count
    off = tl.where(inside, value - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(off * off, 0) / count + number_of(eps_bits, number))
    result = off * inverse
    if weight is not None:
        result *= tl.load(weight + column, mask=inside, other=0.0).to(number)
    if bias is not None:
        result += tl.load(bias + column, mask=inside, other=0.0).to(number)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)
    tl.store(saved + row, mean)
    tl.store(saved + rows + row, inverse)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    grad_normed, grad_sum, total,  # [rows, D] each; the gradients may be None
    saved,  # [2, rows]
    weight, seed,  # [D], scalar; or None
    grad_x, grad_residual,  # [rows, D], or None
    weight_parts, bias_parts,  # [programs, D], or None
    rows, size, rows_a_program, threshold: tl.int64, scale_bits: tl.int64, TILE: tl.constexpr,
):  # fmt: skip
    """One program: rows_a_program rows in turn, and their sums for the gradients of weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    number: tl.constexpr = saved.dtype.element_ty
    column = tl.arange(0, TILE)  # [D]
    inside = column < size
    count = size.to(number)
    of_weight = tl.zeros([TILE], number)  # [D]
    of_bias = tl.zeros([TILE], number)
    first = program * rows_a_program
    for row in range(first, tl.minimum(first + rows_a_program, rows)):
        at = row * size + column
        grad = tl.zeros([TILE], number)
        if grad_normed is not None:
            inverse = tl.load(saved + rows + row)
            value = tl.load(total + at, mask=inside, other=0.0).to(number)
            hat = tl.where(inside, (value - tl.load(saved + row)) * inverse, 0.0)
            upstream = tl.load(grad_normed + at, mask=inside, other=0.0).to(number)
            of_weight += upstream * hat
            of_bias += upstream
            if weight is not None:
                upstream *= tl.load(weight + column, mask=inside, other=0.0).to(number)
            along = tl.sum(upstream * hat, 0) / count
            grad = (upstream - tl.sum(upstream, 0) / count - hat * along) * inverse
        if grad_sum is not None:
            grad += tl.load(grad_sum + at, mask=inside, other=0.0).to(number)
        if grad_residual is not None:
            tl.store(grad_residual + at, grad.to(grad_residual.dtype.element_ty), mask=inside)
        if grad_x is not None:
            if seed is not None:
                grad = tl.where(_kept(seed, row, threshold, TILE), grad * number_of(scale_bits, number), 0.0)
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
    if weight_parts is not None:
        tl.store(weight_parts + program * size + column, of_weight, mask=inside)
    if bias_parts is not None:
        tl.store(bias_parts + program * size + column, of_bias, mask=inside)
