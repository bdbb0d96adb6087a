"""Dropout, the residual connection and LayerNorm in one, without a stored mask."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import backends, reference
from ecore_kernels.dtypes import common_type
from ecore_kernels.operators import registration
from ecore_kernels.operators.autograd import call
from ecore_kernels.operators.batching import register_one_by_one
from ecore_kernels.operators.checks import (
    check_floats,
    check_number,
    check_one_device,
    check_saveable,
    check_shape,
    seed_of,
)
from ecore_kernels.reference_kernels import dropout_add_layer_norm as in_pytorch

NAME = "dropout_add_layer_norm"

registration.library.define(
    f"fused_{NAME}(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, float p, float eps, "
    "str backend) -> (Tensor normed, Tensor sum, Tensor saved)"
)
registration.library.define(
    f"fused_{NAME}_backward(Tensor? grad_normed, Tensor? grad_sum, Tensor sum, Tensor saved, Tensor? weight, "
    "Tensor? seed, float p, bool[] needs, str backend) -> Tensor[]"
)


def _results(x, residual, weight, bias, seed, p, eps):
    """Allocate the results of the forward.

    Args:
        x, residual: [rows, D].
        weight, bias: [D], or None.
        seed: int64 scalar; None drops nothing.

    Returns:
        normed, sum: [rows, D], in the common type of x and residual.
        saved: [2, rows], for the backward: the mean of every row's sum, and one over its standard deviation.
    """
    kind = common_type(x, residual)
    exact = torch.promote_types(kind, torch.float32)
    normed, total = (x.new_empty(x.shape, dtype=kind) for _ in range(2))
    return normed, total, x.new_empty((2, x.shape[0]), dtype=exact)


def _gradients(grad_normed, grad_sum, total, saved, weight, seed, p, needs):
    """Allocate the results of the backward.

    Args:
        grad_normed, grad_sum: gradients of both results; None for 0.
        total, saved: sum and saved of the forward; the rest as it got them.
        needs: which of the gradients of x, residual, weight and bias are wanted.

    Returns:
        those gradients, the first two in the type of total, the others in that of saved; None for those that are not
        wanted.
    """
    like = (total, total, saved, saved)
    shapes = (total.shape, total.shape, total.shape[1:], total.shape[1:])
    return [
        y.new_empty(shape) if needed else None for y, shape, needed in zip(like, shapes, needs, strict=True)
    ]


registration.register(NAME, "forward", _results)
registration.register(NAME, "backward", _gradients)


register_one_by_one(NAME)


def _forward(x, residual, weight, bias, seed, p, eps, backend):
    tensors = (x, residual, weight, bias, seed)
    return registration.run(NAME, "forward", tensors, (*tensors, p, eps, backend))


class _DropoutAddLayerNorm(torch.autograd.Function):
    """Both kernels. Of the inputs' size only the sum is saved, which the blocks of a model keep in any case."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, residual, weight, bias, seed, p, eps, backend):
        return _forward(x, residual, weight, bias, seed, p, eps, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, seed, ctx.p, ctx.eps, ctx.backend = inputs
        _, total, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(total, saved, weight, seed)
        ctx.kinds = tuple((total if y is None else y).dtype for y in (x, residual, weight, bias))

    @staticmethod
    def backward(ctx, grad_normed, grad_sum, _):
        total, saved, weight, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if grad_normed is None and grad_sum is None:
            return (None,) * 8
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # It can be differentiated again: in plain PyTorch, from the sum on.
            exact = total.to(saved.dtype)
            moments = in_pytorch.moments(exact, ctx.eps)
            found = in_pytorch.gradients(grad_normed, grad_sum, exact, moments, weight, seed, ctx.p)
        else:
            arguments = (grad_normed, grad_sum, total, saved, weight, seed, ctx.p, list(needs), ctx.backend)
            made = iter(registration.run(NAME, "backward", arguments[:6], arguments))
            found = tuple(next(made) if needed else None for needed in needs)
        every = zip(found, ctx.kinds, needs, strict=True)
        return *(registration.as_type(y, kind) if needed else None for y, kind, needed in every), *(None,) * 4


# The public function -----------------------------------------------------------------------------------------


def _check(
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    p: Any,
    eps: Any = 1e-5,
    training: bool = True,
    seed: Any = None,
    backend: str | None = None,
) -> None:
    """Raise ValueError unless the arguments fit each other."""
    check_floats(NAME, x=x, residual=residual)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{NAME}: x: expected [..., D] with D >= 1, got {list(x.shape)}")
    check_shape(NAME, "residual", residual, x.shape)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_floats(NAME, **{name: tensor})
            check_shape(NAME, name, tensor, x.shape[-1:])
    check_number(NAME, "p", p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{NAME}: p: expected 0 to 1, got {p}")
    check_number(NAME, "eps", eps)
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.dim() != 0:
            raise ValueError(
                f"{NAME}: seed: expected an int64 scalar, got {str(seed.dtype).removeprefix('torch.')} "
                f"{list(seed.shape)}"
            )
    elif seed is not None:
        if not isinstance(seed, numbers.Integral):
            raise ValueError(f"{NAME}: seed: expected an int, a tensor or None, got {type(seed).__name__}")
        if not -(2**63) <= int(seed) < 2**64:
            raise ValueError(f"{NAME}: seed: expected 64 bits, got {seed}")
    check_one_device(NAME, x, residual, weight, bias, seed)


def _seed_tensor(seed: Any, device: torch.device) -> Tensor:
    """A seed as an int64 scalar on ``device``; None draws one there from torch's generator."""
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    return seed_of(seed, device)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    *,
    eps: float = 1e-5,
    training: bool = True,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, the residual connection and LayerNorm in one, as between two layers of a pre-norm Transformer.

    ``sum = residual + dropout(x)``; ``normed = (sum - mean) / sqrt(variance + eps) * weight + bias`` over the last
    dimension. One pass over memory each way. The backward computes the mask again, so it is never stored: with x seen
    as [rows, D], element (row, column) has a random word, ``column % 4`` of the four of Philox 4x32-10 with the seed
    for the key and ``(column // 4, row mod 2^32, row // 2^32, 0)`` for the counter, and is kept where the word is at
    least ``round(p * 2^32)``. Elements that are kept are divided by 1 - p. Elements that are dropped are not read, so
    they may be NaN or infinity. Masks and sums are the same bits on every run, for every number of threads and on every
    backend.

    Args:
        x: [..., D]: the output of a layer.
        residual: [..., D]: what went into it.
        weight, bias: [D], of the LayerNorm; None for 1 and 0.
        p: the chance that an element is dropped, 0 to 1.
        eps: added to the variance.
        training: False drops nothing.
        seed: 64 bits, an int, or an int64 scalar on the device, which may change between replays of a CUDA graph. None
            draws one there, from torch's generator.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        normed, sum: [..., D], in the common type of x and residual, with or without autocast; arithmetic is float32 at
        least.

    Gradients reach x, residual, weight and bias, and can be differentiated again.

    Raises:
        ValueError: a shape, a type or a number that does not fit.
        RuntimeError: the named backend cannot run the call.
    """
    _check(x, residual, weight, bias, p, eps, training, seed, backend)
    chosen = backends.choose(NAME, backend, x, residual, weight, bias, p)
    at = _seed_tensor(seed, x.device) if training and p > 0.0 else None
    shape, size = x.shape, x.shape[-1]
    rows = x.reshape(-1, size), residual.reshape(-1, size)
    # An exported program of the reference consists of PyTorch's own operations, so it runs without this package.
    plain = chosen == "reference" and torch.compiler.is_exporting()
    if plain or backends.differentiates_forward():
        normed, total = reference.dropout_add_layer_norm(*rows, weight, bias, at, p, eps)
        kind = common_type(x, residual)
        return normed.to(kind).view(shape), total.to(kind).view(shape)
    normed, total = _apply((*rows, weight, bias, at), (float(p), float(eps), chosen))
    return normed.view(shape), total.view(shape)


def _apply(tensors: tuple[Any, ...], setting: tuple[float, float, str]) -> tuple[Tensor, Tensor]:
    """The results, with a backward if a tensor requires a gradient."""
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    wanting = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in tensors)
    if not wanting and not transformed:
        x, residual, weight, bias, seed = tensors
        normed, total, _ = _forward(x, residual, weight, bias, seed, *setting)
        return normed, total
    try:
        normed, total, _ = call(_DropoutAddLayerNorm, *tensors, *setting)
    except RuntimeError:
        check_saveable(NAME, **dict(zip(("x", "residual", "weight", "bias", "seed"), tensors, strict=True)))
        raise
    return normed, total


backends.register(NAME, dropout_add_layer_norm, _check)
