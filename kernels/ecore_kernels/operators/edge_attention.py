"""Attention whose scores are multiplied by edge weights, on any dense graph."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ecore_kernels import backends, reference
from ecore_kernels.dtypes import common_type
from ecore_kernels.operators import registration
from ecore_kernels.operators.checks import (
    check_floats,
    check_number,
    check_one_device,
    check_scalar,
    check_shape,
    check_tensors,
    seed_of,
)
from ecore_kernels.operators.fused_edge_attention import fused_edge_attention
from ecore_kernels.operators.history import row_factor
from ecore_kernels.operators.plans import (
    Plan,
    bound_forward,
    runs_at_once,
    score_scale,
    settled,
    takes_as_they_are,
    without_autocast,
)
from ecore_kernels.refusals import shown

registration.library.define(
    "edge_attention(Tensor query, Tensor key, Tensor value, Tensor? edge, Tensor? neighbors, Tensor? gate, "
    "Tensor? edge_scale, float scale, Tensor? bias, Tensor? edge_bias, Tensor? sender_gate, Tensor? seed, "
    "float[]? clamp, float dropout, bool all_pairs, bool with_lse) -> (Tensor, Tensor, Tensor)"
)


def _composite(query: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(query.new_empty(0) if x is None else x for x in reference.edge_attention(query, *arguments))


# Composite: autograd, torch.func and torch.compile see the PyTorch operations that the operator consists of.
registration.library.impl("edge_attention", _composite, "CompositeImplicitAutograd")
registration.library.impl("edge_attention", _composite, "FuncTorchBatchedDecomposition")


@overload
def edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None = None,
    neighbors: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    edge_scale: Tensor | float | None = None,
    edge_bias: Tensor | float | None = None,
    sender_gate: Tensor | None = None,
    update: str = "neighbors",
    scale: Tensor | float | None = 1.0,
    clamp: Sequence[float] | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]: ...


@overload
def edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None = None,
    neighbors: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    edge_scale: Tensor | float | None = None,
    edge_bias: Tensor | float | None = None,
    sender_gate: Tensor | None = None,
    update: str = "neighbors",
    scale: Tensor | float | None = 1.0,
    clamp: Sequence[float] | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]: ...


def edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None = None,
    neighbors: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    edge_scale: Tensor | float | None = None,
    edge_bias: Tensor | float | None = None,
    sender_gate: Tensor | None = None,
    update: str = "neighbors",
    scale: Tensor | float | None = 1.0,
    clamp: Sequence[float] | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Attention on any dense graph, with scores multiplied by edge weights, and the update of the edges (Eqs. 4 to 7).

    ``x = clamp(scale * query @ key^T) * edge * sender_gate``; ``output = dropout(softmax over neighbours of
    (x + bias)) @ value``; ``new_edge = gate * edge_scale * (edge + x) + edge_bias``. A row without neighbours gives 0.
    Off the graph nothing is read, neither weights of edges nor values of senders without receivers; they may be NaN.

    Args:
        query: [B, H, Nq, d], the receivers.
        key: [B, Hk, Nk, d], the senders. Hk divides H: head h has the keys and values of head h // (H / Hk).
        value: [B, Hk, Nk, dv].
        edge: weights that broadcast to [B, H, Nq, Nk], of any real type; row i receives, column j sends. None means 1.
        neighbors: bool, broadcasts to [B, H, Nq, Nk]; None means a complete graph.
        bias: what is added to the weighted scores, broadcasts to [B, H, Nq, Nk]. It is not part of the update.
        gate: [B, H, Nq], of the update. If ``gate``, ``edge_scale`` or ``edge_bias`` is given, the updated edges are
            returned; those left out are 1, 1 and 0.
        edge_scale, edge_bias: scalars of the update.
        sender_gate: [B, H, Nk], a factor on all that a node sends.
        update: "neighbors": edges off the graph become 0; "all": they are updated too, and therefore read.
        scale: factor on the scores, a number or a tensor of one; None means 1 / sqrt(d). A new number does not
            recompile a kernel.
        clamp: (low, high), bounds of a scaled product of query and key. Outside of them its gradient is 0.
        dropout: probability, from 0 to 1, that a weight of the softmax is dropped; the others are divided by
            1 - dropout.
        seed: of the dropout: an int of 64 bits, or an int64 tensor of one element (which can change between replays of
            a CUDA graph). All backends compute the same mask from it: a weight is kept where the first word of Philox
            4x32-10 at counter (j, i, b * H + h, 0) is at least round(dropout * 2^32). None draws a seed on the device.
        return_lse: whether to return the logarithm of the sum that the softmax divides by.
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        output: [B, H, Nq, dv], in the common type of query, key and value.
        new_edge: [B, H, Nq, Nk], 0 off the graph unless ``update="all"``; None without an update.
        lse: [B, H, Nq], -inf in a row without neighbours; only with ``return_lse``.

    Gradients reach query, key, value, edge, bias, gate, sender_gate, edge_scale, edge_bias and a scale in a tensor,
    and can be differentiated again.

    Raises:
        ValueError: a shape, a type or a number that does not fit.
        RuntimeError: the named backend cannot run the call.
    """
    tensors = (query, key, value, edge, neighbors, gate, edge_scale, bias, sender_gate, edge_bias)
    plain = update == "neighbors" and clamp is None and dropout.__class__ is float and not dropout
    if plain and seed is None and return_lse is False:
        options: Any = backend
    else:
        clamp, dropout = _checked_options(update, clamp, dropout, seed, return_lse)
        options = (backend, update, clamp, dropout, return_lse)
    plan = settled(
        _plans, tensors, options, lambda: _plan(tensors, update, clamp, dropout, return_lse, backend)
    )
    full = (*query.shape[:3], key.shape[2])
    if edge is not None:
        edge = _broadcastable("edge", edge, full)
    if neighbors is not None:
        neighbors = _broadcastable("neighbors", neighbors, full)
    if bias is not None:
        bias = _broadcastable("bias", bias, full)
    updated = gate is not None or edge_scale is not None or edge_bias is not None
    drawn = _seed(seed, query.device) if dropout else None
    if plan.bound is not None and scale.__class__ is float and runs_at_once(plan):
        added = None if edge_bias is None else _as_scalar(edge_bias, query)
        inputs = query, key, value, edge, neighbors, bias, sender_gate, added, drawn
        if not updated:
            found = plan.bound(inputs, (), (), scale)
            return (found[0], None, found[1]) if return_lse else (found[0], None)
        gates = query.new_ones(query.shape[:3]) if gate is None else gate
        return plan.bound(inputs, (gates,), (edge_scale,), scale)
    kind, chosen = plan.autocast, plan.backend
    if kind is not None:
        query, key, value = (backends.autocast(x, kind) for x in (query, key, value))
    scale, (query,) = score_scale("edge_attention", scale, query.shape[3], (query,))
    with without_autocast(query.device, kind):
        if chosen == "reference":
            number = reference.compute_type(*((query, key, value, edge) if gate is None else (gate,)))
            edge_scale, edge_bias = (
                None if x is None else torch.as_tensor(x, device=query.device, dtype=number).reshape(())
                for x in (edge_scale, edge_bias)
            )
            output, new_edge, lse = torch.ops.ecore_kernels.edge_attention(
                query, key, value, edge, neighbors, gate, edge_scale, scale, bias, edge_bias, sender_gate, drawn,
                clamp, dropout, update == "all", return_lse,
            )  # fmt: skip
        else:
            factor = None
            if updated:
                number = reference.compute_type(query, key, value, edge)
                gates = query.new_ones(query.shape[:3], dtype=number) if gate is None else gate
                factor = row_factor(((None, None, gates, 1.0 if edge_scale is None else edge_scale),))
            output, new_edge, lse = fused_edge_attention(
                query, key, value, edge, neighbors, bias, factor, sender_gate, edge_bias, drawn,
                (scale, clamp, dropout, updated and update == "all", return_lse), chosen,
            )  # fmt: skip
    if output.dtype is not plan.result:
        output = output.to(plan.result)
    results = output, new_edge if updated else None
    return (*results, lse) if return_lse else results


_plans: dict[Any, Plan] = {}


def _as_scalar(number: Any, query: Tensor) -> Tensor | None:
    """A number as a tensor like ``query``; a tensor and None stay as they are."""
    return number if number is None or isinstance(number, Tensor) else query.new_full((), number)


def _seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed of a dropout as int64 of no dimensions on the device."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(()).to(device)
    return seed_of(seed, device)


def _checked_options(
    update: Any, clamp: Any, dropout: Any, seed: Any, return_lse: Any
) -> tuple[tuple[float, float] | None, float]:
    """Return ``clamp`` and ``dropout`` as floats.

    Raises:
        ValueError: an option of the wrong type or out of range.
    """
    if not isinstance(update, str) or update not in ("neighbors", "all"):
        raise ValueError(f"edge_attention: update: expected 'neighbors' or 'all', got {shown(update)}")
    if not isinstance(return_lse, bool):
        raise ValueError(f"edge_attention: return_lse: expected True or False, got {shown(return_lse)}")
    check_number("edge_attention", "dropout", dropout)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"edge_attention: dropout: expected a probability from 0 to 1, got {dropout}")
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"edge_attention: seed: expected one int64, got {list(seed.shape)} of {seed.dtype}"
            )
    elif seed is not None and (
        isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not -(2**63) <= int(seed) < 2**64
    ):
        raise ValueError(
            f"edge_attention: seed: expected an int of 64 bits, an int64 tensor or None, got {seed!r}"
        )
    if clamp is None:
        return None, float(dropout)
    if not isinstance(clamp, (list, tuple)) or len(clamp) != 2:
        raise ValueError(f"edge_attention: clamp: expected (low, high), got {shown(clamp)}")
    for bound in clamp:
        check_number("edge_attention", "clamp", bound)
    low, high = map(float, clamp)
    if not low <= high:
        raise ValueError(f"edge_attention: clamp: expected low <= high, got ({low}, {high})")
    return (low, high), float(dropout)


def _check(
    query: Any,
    key: Any,
    value: Any,
    edge: Any = None,
    neighbors: Any = None,
    gate: Any = None,
    edge_scale: Any = None,
    bias: Any = None,
    sender_gate: Any = None,
    edge_bias: Any = None,
    update: Any = "neighbors",
    clamp: Any = None,
    dropout: Any = 0.0,
    seed: Any = None,
    return_lse: Any = False,
    **_: Any,
) -> None:
    """Raise ValueError unless the arguments fit each other."""
    check_floats("edge_attention", query=query, key=key, value=value)
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(
            f"edge_attention: expected query [B, H, Nq, d], key [B, Hk, Nk, d] and value [B, Hk, Nk, dv], got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    batch, heads, receivers, dim = query.shape
    kept_heads, senders = key.shape[1:3]
    if kept_heads != heads and (kept_heads < 1 or heads % kept_heads):
        raise ValueError(
            f"edge_attention: key: expected a number of heads that divides the {heads} of query, got {kept_heads}"
        )
    check_shape("edge_attention", "key", key, (batch, kept_heads, senders, dim))
    check_shape("edge_attention", "value", value, (batch, kept_heads, senders, value.shape[3]))
    for name, tensor, size in (("gate", gate, receivers), ("sender_gate", sender_gate, senders)):
        if tensor is not None:
            check_tensors("edge_attention", **{name: tensor})
            check_shape("edge_attention", name, tensor, (batch, heads, size))
    for name, number in (("edge_scale", edge_scale), ("edge_bias", edge_bias)):
        if number is not None:
            check_scalar("edge_attention", name, number)
    full = (batch, heads, receivers, senders)
    for name, tensor in (("edge", edge), ("bias", bias), ("neighbors", neighbors)):
        if tensor is not None:
            check_tensors("edge_attention", **{name: tensor})
            _broadcastable(name, tensor, full)
    if neighbors is not None and neighbors.dtype != torch.bool:
        raise ValueError(f"edge_attention: neighbors: expected torch.bool, got {neighbors.dtype}")
    _checked_options(update, clamp, dropout, seed, return_lse)


def _plan(
    tensors: Sequence[Any],
    update: str,
    clamp: Sequence[float] | None,
    dropout: float,
    return_lse: bool,
    backend: str | None,
) -> Plan:
    query, key, value, edge, neighbors, gate, edge_scale, bias, sender_gate, edge_bias = tensors
    _check(*tensors)
    kind = backends.autocast_type(query.device)
    nodes = [backends.autocast(x, kind) for x in (query, key, value)]
    chosen = backends.choose(
        "edge_attention", backend, *nodes, edge, neighbors, bias=bias, gate=gate, edge_scale=edge_scale,
        edge_bias=edge_bias, sender_gate=sender_gate, update=update, clamp=clamp, dropout=dropout,
        return_lse=return_lse,
    )  # fmt: skip
    if chosen != "reference":
        check_one_device("edge_attention", query, key, value, edge, neighbors, gate, bias, sender_gate)
    as_they_are, bound = False, None
    if kind is None:
        weights = edge, gate, bias, sender_gate
        as_they_are = takes_as_they_are(chosen, nodes, weights, (neighbors,), (edge_scale, edge_bias))
    if as_they_are:
        full = (*query.shape[:3], key.shape[2])
        shared = [None if x is None else _broadcastable("", x, full) for x in (edge, neighbors, bias)]
        updated = gate is not None or edge_scale is not None or edge_bias is not None
        gates, scales = ((gate,), (edge_scale,)) if updated else ((), ())
        factor = query.new_empty(0) if updated else None  # not read
        seed = query.new_empty((), dtype=torch.int64) if dropout else None
        arguments = (
            *nodes, *shared, factor, sender_gate, _as_scalar(edge_bias, query), seed, 1.0, clamp, dropout,
            updated and update == "all", return_lse, "ieee",
        )  # fmt: skip
        bound = bound_forward("edge_attention", chosen, arguments, gates, scales)
    return Plan(chosen, kind, common_type(*nodes), as_they_are, bound)


def _broadcastable(name: str, tensor: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """``tensor`` as [1 or B, 1 or H, Nq, Nk]: a size of 1 for what batch or heads share."""
    given = tuple(tensor.shape)
    if given == shape:
        return tensor
    sizes = (1,) * (4 - len(given)) + given
    if len(sizes) > 4 or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"edge_attention: {name}: expected a shape that broadcasts to {list(shape)}, got {list(given)}"
        )
    return tensor.expand(*sizes[:2], *shape[2:])


backends.register("edge_attention", edge_attention, _check)
