"""The history of an operator: the updates of the edges by earlier layers, and r, the product of their gates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecore_kernels import backends
from ecore_kernels.operators.autograd import call


class EdgeUpdate(NamedTuple):
    """The update of the edges by one earlier layer: E' = gate * edge_scale * E * (1 + scale * query . key) (Eqs. 5, 7).

    Attributes:
        query: [B, K, N, d].
        key: [B, K, N, d].
        gate: [B, K, N], one number W_V h_i per receiving node and resolution; None for a factor of 1.
        edge_scale: scalar W_E; given if and only if ``gate`` is.
    """

    query: Tensor
    key: Tensor
    gate: Tensor | None = None
    edge_scale: Tensor | float | None = None


# A named tuple is a pytree already; the name is what exported programs are saved under.
pytree._register_namedtuple(EdgeUpdate, serialized_type_name="ecore_kernels.EdgeUpdate")


torch.serialization.add_safe_globals([EdgeUpdate])


class _RowFactor(torch.autograd.Function):
    """The product of gates [B, K, N] and scalar edge scales, given alternately.

    A node that takes no part has a gradient of 0, but its gate may be anything, even NaN, and their product would spoil
    the other gradients. So a gate that is not finite counts as 0 in gradients. If its node does take part, the gradient
    is NaN in any case.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*factors):
        product = factors[0] * factors[1]
        for gate, scale in zip(factors[2::2], factors[3::2], strict=True):
            product = product * (gate * scale)
        return product

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))

    @staticmethod
    def backward(ctx, gradient):
        factors = [x if n is None else n for x, n in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        gates, scales = [x.nan_to_num(0.0, 0.0, 0.0) for x in factors[::2]], factors[1::2]
        layers = [gate * scale for gate, scale in zip(gates, scales, strict=True)] if len(gates) > 1 else []
        gradients = []
        for layer, (gate, scale) in enumerate(zip(gates, scales, strict=True)):
            rest = gradient
            for other in (*layers[:layer], *layers[layer + 1 :]):
                rest = rest * other
            gradients.append(rest * scale if ctx.needs_input_grad[2 * layer] else None)
            gradients.append((rest * gate).sum() if ctx.needs_input_grad[2 * layer + 1] else None)
        return tuple(gradients)


def _factors(history: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Gates [B, K, N] in float32 at least and their edge scales, alternately."""
    factors: list[Any] = []
    for _, _, gate, scale in history:
        if gate is None:
            continue
        if gate.dtype is not torch.float32 and gate.dtype is not torch.float64:
            gate = gate.to(torch.float32)
        if isinstance(scale, Tensor):
            if scale.dim():
                scale = scale.reshape(())
            if scale.dtype is not gate.dtype:
                scale = scale.to(gate.dtype)
        factors += (gate, scale)
    return factors


def row_factor(history: Iterable[tuple[Any, ...]]) -> Tensor | None:
    """r = prod_m gate^m * edge_scale^m, [B, K, N] in float32 at least; None if no layer has a gate."""
    factors = _factors(history)
    if not factors:
        return None
    # Tensors of torch.func hide whether they require a gradient. In forward mode the product's own derivatives are
    # used.
    if torch.is_grad_enabled() and (
        any(isinstance(x, Tensor) and x.requires_grad for x in factors)
        or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())
    ):
        if backends.differentiates_forward():
            return _RowFactor.forward(*factors)
        return call(_RowFactor, *factors)
    return _RowFactor.forward(*factors)


def autocast_history(history: Sequence[EdgeUpdate], kind: torch.dtype | None) -> list[EdgeUpdate]:
    """``history`` with its queries and keys in the type that :func:`backends.autocast_type` gave."""
    return [
        EdgeUpdate(backends.autocast(u.query, kind), backends.autocast(u.key, kind), u.gate, u.edge_scale)
        for u in history
    ]
