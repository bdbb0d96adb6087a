"""Attention inside sequences of different lengths, without padding."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ecore_kernels import backends, reference
from ecore_kernels.dtypes import common_type, kernel_type, weight_type
from ecore_kernels.operators import registration
from ecore_kernels.operators.batching import register_one_by_one
from ecore_kernels.operators.checks import check_floats, check_number, check_one_device
from ecore_kernels.operators.plans import has_static_value
from ecore_kernels.sequences import Sequences

NAME = "varlen_attention"


def parts(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [R, H, d], keys [S, G, d] and values [S, G, dv] of a call; views where they lie side by side."""
    if key is None:
        query, key, value = query.unbind(1)
    elif value is None:
        key, value = key.unbind(1)
    return query, key, value


# In plain PyTorch ------------------------------------------------------------------------------------------


def _padded(rows: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Rows [R, H, d] by sequence, [B, H, longest, d] with zeros behind each; and where there are rows, [B, longest]."""
    columns = torch.arange(longest, device=rows.device)
    there = columns < offsets.diff()[:, None]
    places = torch.where(there, offsets[:-1, None] + columns, rows.shape[0])  # [B, longest]
    return F.pad(rows, (0, 0, 0, 0, 0, 1))[places].transpose(1, 2), there


def _reference(
    setting: tuple[Any, ...],
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    offsets: Tensor,
    key_offsets: Tensor | None,
) -> Tensor:
    """Pad, attend, and take the padding out again: the output [R, H, dv], in the type of the queries."""
    causal, scale, longest, key_longest, *_ = setting
    query, key, value = parts(query, key, value)
    kind, rows = query.dtype, torch.arange(query.shape[0], device=query.device)
    number = weight_type(kind)
    of_keys = offsets if key_offsets is None else key_offsets
    queries, _ = _padded(query.to(number), offsets, longest)
    keys, heard = _padded(key.to(number), of_keys, key_longest)
    values, _ = _padded(value.to(number), of_keys, key_longest)
    sharing = query.shape[1] // max(key.shape[1], 1)
    keys, values = (x.repeat_interleave(sharing, 1) if sharing > 1 else x for x in (keys, values))
    heard = heard[:, None, None]  # [B, 1, 1, longest keys]
    if causal:
        heard = heard & heard.new_ones(longest, key_longest).tril()
    found = reference.attend(scale * (queries @ keys.mT), heard, heard.any(-1, keepdim=True), values)
    output = found.transpose(1, 2).flatten(0, 1)  # [B * longest, H, dv]
    sequence = torch.searchsorted(offsets[1:], rows, right=True)  # [R]
    return output[sequence * longest + rows - offsets[sequence]].to(kind)


# On fused kernels -------------------------------------------------------------------------------------------

_INPUTS = "Tensor query, Tensor? key, Tensor? value, Tensor offsets, Tensor? key_offsets"
registration.library.define(
    f"fused_{NAME}({_INPUTS}, bool causal, float scale, str backend) -> (Tensor output, Tensor statistics)"
)
registration.library.define(
    f"fused_{NAME}_backward(Tensor grad_output, {_INPUTS}, Tensor output, Tensor statistics, bool causal, float scale, "
    "bool[] needs, str backend) -> Tensor[]"
)
_DIFFERENTIABLE = 3
"""Tensors that may have a gradient, the first of a call's."""


def _results(query, key, value, offsets, key_offsets, causal, scale):
    """Allocate the results of the forward.

    Args:
        query, key, value: of one type; as :func:`parts` takes them.
        offsets: int64 [B + 1], of queries; key_offsets: of keys and values, None for the same.
        causal, scale: of the call.

    Returns:
        output: [R, H, dv].
        statistics: [2, H, R], for the backward: the maximum of a query's scores, to base 2, and one over the sum of
            their powers.
    """
    query, _, value = parts(query, key, value)
    rows, heads, _ = query.shape
    kind = weight_type(query.dtype)
    return query.new_empty(rows, heads, value.shape[2]), query.new_empty(2, heads, rows, dtype=kind)


def _gradients(
    grad_output, query, key, value, offsets, key_offsets, output, statistics, causal, scale, needs
):
    """Allocate the results of the backward: gradients in their tensors' shapes, None for those not needed."""
    return [
        x.new_empty(x.shape) if needed and x is not None else None
        for x, needed in zip((query, key, value), needs, strict=True)
    ]


registration.register(NAME, "forward", _results)
registration.register(NAME, "backward", _gradients)


register_one_by_one(NAME)


def _forward(setting, tensors):
    causal, scale, _, _, backend = setting
    return registration.run(NAME, "forward", tensors, (*tensors, causal, scale, backend))


def _backward(setting, needs, gradients, tensors, kept):
    causal, scale, _, _, backend = setting
    arguments = (*gradients, *tensors, *kept, causal, scale, list(needs[:_DIFFERENTIABLE]), backend)
    return registration.run(NAME, "backward", (*gradients, *tensors), arguments)


registration.OPERATORS[NAME] = registration.FusedOperator(
    _forward,
    _backward,
    lambda setting, tensors: (_reference(setting, *tensors[:5]),),
    1,
    (0, 1),
    lambda _: ["query", "key", "value", "offsets", "key_offsets"],
)


# The public function -----------------------------------------------------------------------------------------


def varlen_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    sequences: Sequences,
    key_sequences: Sequences | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention inside each of several sequences, whose rows lie one after the other.

    ``output_i = sum_j softmax_j(scale * q_i . k_j) v_j``, over the rows j of the sequence of row i. Nothing is computed
    for padding, since there is none. Projections that lie side by side in memory need not be taken apart: their
    gradient comes back in one piece.

    Args:
        query: [R, H, d]: rows, heads, head size. Or [R, 3, H, d], queries, keys and values side by side, with ``key``
            and ``value`` None.
        key: [S, G, d]: of G heads, each of which H / G heads of queries share. Or [S, 2, G, d], keys and values side by
            side, with ``value`` None.
        value: [S, G, dv].
        sequences: of the queries, R rows in all.
        key_sequences: of keys and values, S rows in all, as many sequences; None: the same as the queries'. A query
            whose sequence has no keys gets 0.
        causal: a row hears no later row of its sequence; not with ``key_sequences``.
        scale: factor on the scores; None means 1 / sqrt(d).
        backend: "reference" (which pads), "native"; None takes the fastest that can run the call.

    Returns:
        [R, H, dv], in the common type of query, key and value.

    Gradients reach query, key and value, and can be differentiated again; those of the fused kernel are the same bits
    on every run and for every number of threads.

    Raises:
        ValueError: a shape or a type that does not fit.
        RuntimeError: the named backend cannot run the call.
    """
    _check(query, key, value, sequences, key_sequences, causal, scale)
    of_keys = sequences if key_sequences is None else key_sequences
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if torch.compiler.is_compiling() and not has_static_value(scale):
        # As an argument of the operator every number would compile it anew.
        query, key, value = parts(query, key, value)
        query, scale = query * scale, 1.0
    kind = backends.autocast_type(query.device)
    nodes = [None if x is None else backends.autocast(x, kind) for x in (query, key, value)]
    given = [x for x in nodes if x is not None]
    chosen = backends.choose(NAME, backend, *nodes)
    result = common_type(*given)
    setting = (causal, float(scale), sequences.longest, of_keys.longest, chosen)
    offsets = (sequences.offsets, None if key_sequences is None else key_sequences.offsets)
    with torch.autocast(query.device.type, enabled=False) if kind is not None else _NOTHING:
        if chosen == "reference":
            same: list[Any] = [None if x is None else x.to(result) for x in nodes]
            same += offsets
            return _reference(setting, *same)
        made = iter(registration.apart(given, kernel_type(result, chosen)))
        output, _ = registration.apply(
            NAME, setting, *(None if x is None else next(made) for x in nodes), *offsets
        )
    return registration.as_type(output, result)


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def _shape(x: Any) -> list[int]:
    return list(x.shape)


def _check(
    query: Any,
    key: Any,
    value: Any,
    sequences: Any,
    key_sequences: Any = None,
    causal: Any = False,
    scale: Any = None,
    **_: Any,
) -> None:
    """Raise ValueError unless the arguments fit each other."""
    given = {name: x for name, x in (("key", key), ("value", value)) if x is not None}
    check_floats(NAME, query=query, **given)
    if key is None and value is not None:
        raise ValueError(f"{NAME}: value: expected None beside no key, got {_shape(value)}")
    for name, of in (("sequences", sequences), ("key_sequences", key_sequences)):
        if not isinstance(of, Sequences) and (name == "sequences" or of is not None):
            raise ValueError(f"{NAME}: {name}: expected Sequences, got {type(of).__name__}")
    if scale is not None:
        check_number(NAME, "scale", scale)
    if causal and key_sequences is not None:
        raise ValueError(
            f"{NAME}: causal: expected key_sequences None: keys are in the order of their queries"
        )
    if key is None:
        if query.dim() != 4 or query.shape[1] != 3:
            raise ValueError(f"{NAME}: query: expected [R, 3, H, d] without a key, got {_shape(query)}")
    elif query.dim() != 3:
        raise ValueError(f"{NAME}: query: expected [R, H, d], got {_shape(query)}")
    if query.shape[-1] < 1:
        raise ValueError(f"{NAME}: query: expected heads of at least one element, got {_shape(query)}")
    of_keys = sequences if key_sequences is None else key_sequences
    heads, size = query.shape[-2:]
    if query.shape[0] != sequences.rows:
        raise ValueError(
            f"{NAME}: query: expected the {sequences.rows} rows of its sequences, got {_shape(query)}"
        )
    if key is not None:
        inner = [] if value is not None else [2]
        if key.dim() != 3 + len(inner) or _shape(key) != [of_keys.rows, *inner, key.shape[-2], size]:
            wanted = ", ".join(str(x) for x in (of_keys.rows, *inner, "G", size))
            raise ValueError(f"{NAME}: key: expected [{wanted}], got {_shape(key)}")
        if heads % max(key.shape[-2], 1) or (heads and not key.shape[-2]):
            raise ValueError(
                f"{NAME}: key: expected a divisor of the {heads} heads of queries, got {key.shape[-2]}"
            )
        if value is not None and (value.dim() != 3 or _shape(value)[:2] != [of_keys.rows, key.shape[1]]):
            raise ValueError(
                f"{NAME}: value: expected [{of_keys.rows}, {key.shape[1]}, dv], got {_shape(value)}"
            )
    if len(of_keys) != len(sequences):
        raise ValueError(f"{NAME}: key_sequences: expected {len(sequences)} sequences, got {len(of_keys)}")
    check_one_device(NAME, query, key, value, sequences.offsets, of_keys.offsets)


backends.register(NAME, varlen_attention, _check)
