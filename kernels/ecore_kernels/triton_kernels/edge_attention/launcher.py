"""Launches of attention on any dense graph: what the kernels read, and where they write.

Arguments and results are those of ``_results`` and ``_gradients`` in :mod:`ecore_kernels.operators.edge_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ecore_kernels.layout import (
    dense_rows,
    fill_lse,
    laid_out_like,
    own_heads,
    sum_heads,
    sum_updated,
)
from ecore_kernels.philox import threshold
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.edge_attention.backward_kernel import _backward
from ecore_kernels.triton_kernels.edge_attention.deltas_kernel import _sum_deltas
from ecore_kernels.triton_kernels.edge_attention.forward_kernel import _forward


def _setting(query: Tensor, value: Tensor, precision: str, direction: str):
    """Kernel constants and the compiler's options, which depend on types and head sizes alone."""
    arithmetic = launch.arithmetic_of(query.dtype, precision)
    dim, value_dim = query.shape[3], value.shape[3]
    tile_dim, tile_value = launch.padded(dim), launch.padded(value_dim)
    constants, options = launch.configuration(
        f"edge_attention_{direction}",
        arithmetic,
        max(tile_dim, tile_value),
        0,
        launch.architecture(query.device),
    )
    tiles = {"DIM": dim, "VALUE_DIM": value_dim, "TILE_DIM": tile_dim, "TILE_VALUE": tile_value}
    return {**tiles, "PRECISION": launch.dot_precision(arithmetic), **constants}, options


def _mask(neighbors: Tensor | None, query: Tensor) -> Tensor | None:
    """The neighbours as the kernels load them: with float64 tensors, not as bytes.

    The compiler packs the operands of a product as tightly as the narrowest load that they depend on. If that is four
    bytes for four 64-bit numbers, it fails for sm_80 and sm_90.
    """
    return neighbors.to(torch.int32) if neighbors is not None and query.dtype is torch.float64 else neighbors


def _matrices(name: str, tensor: Tensor | None) -> dict[str, Tensor | int | None]:
    """Kernel arguments: [B or 1, K or 1, N, N] and its strides; copied unless a row's elements lie side by side."""
    if tensor is None:
        return {name: None, f"{name}_batch": 0, f"{name}_head": 0, f"{name}_row": 0}
    if tensor.shape[3] > 1 and tensor.stride(3) != 1:
        tensor = tensor.contiguous()
    batch, head = (0 if tensor.shape[i] == 1 else tensor.stride(i) for i in (0, 1))
    return {name: tensor, f"{name}_batch": batch, f"{name}_head": head, f"{name}_row": tensor.stride(2)}


def _more(
    bias: Tensor | None,
    sender_gate: Tensor | None,
    seed: Tensor | None,
    clamp: Sequence[float] | None,
    dropout: float,
) -> dict[str, Any]:
    """Kernel arguments: what both directions read besides nodes, edges and neighbours."""
    low, high = clamp or (0.0, 0.0)
    return {
        **_matrices("bias", bias),
        "sender_gate": None if sender_gate is None else sender_gate.contiguous(),
        "seed": seed,
        "low_bits": launch.bits(low),
        "high_bits": launch.bits(high),
        "CLAMP": bool(clamp),
        "least_kept": threshold(dropout),
        "kept_bits": launch.bits(1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0),
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    neighbors: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    sender_gate: Tensor | None,
    edge_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    clamp: Sequence[float] | None,
    dropout: float,
    all_pairs: bool,
    with_lse: bool,
    precision: str,
    results: Sequence[Tensor],
) -> None:
    """Launch the forward kernel."""
    batch, heads, receivers, _ = query.shape
    output, new_edge, lse, saved = results
    if 0 in (batch, heads, receivers):
        return
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    constants, options = _setting(query, value, precision, "forward")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        **_matrices("edge", edge),
        **_matrices("neighbors", _mask(neighbors, query)),
        **_more(bias, sender_gate, seed, clamp, dropout),
        "edge_bias": edge_bias,
        "factor": None if factor is None else factor.to(saved.dtype).contiguous(),
        "new_edge": None if factor is None else new_edge,
        "output": output,
        "saved": saved,
        "plane": batch * heads * receivers,
        "heads": heads,
        "group": heads // key.shape[1],
        "receivers": receivers,
        "senders": key.shape[2],
        **launch.strides(query=query, key=key, value=value, output=output),
        "scale_bits": launch.bits(scale),
        "ALL_PAIRS": all_pairs,
        **constants,
    }
    programs = batch * heads * triton.cdiv(receivers, constants["BLOCK"])
    launch.launch(_forward, (programs,), arguments, options, query.device)
    fill_lse(saved, lse)


def backward(
    grad_output: Tensor,
    grad_new_edge: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    neighbors: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    sender_gate: Tensor | None,
    edge_bias: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    saved: Tensor,
    scale: float,
    clamp: Sequence[float] | None,
    dropout: float,
    all_pairs: bool,
    needs: list[bool],
    precision: str,
    results: Sequence[Tensor | None],
) -> None:
    """Launch the backward kernel."""
    batch, heads, receivers, _ = query.shape
    senders = key.shape[2]
    grad_query, grad_key, grad_value, grad_edge, grad_bias, grad_factor, grad_sender_gate, grad_edge_bias = (
        results
    )
    grad_new_edge = None if factor is None else grad_new_edge
    sum_updated(grad_new_edge, None if all_pairs else neighbors, grad_edge_bias)
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    grad_output = laid_out_like(grad_output, output)
    if grad_factor is not None and grad_new_edge is None:
        grad_factor.zero_()
        grad_factor = None
    if 0 in (batch, heads, receivers, senders):
        for result in (grad_query, grad_key, grad_value, grad_edge, grad_bias, grad_factor, grad_sender_gate):
            if result is not None:
                result.zero_()
        return
    of_key, of_value = own_heads(grad_key, query), own_heads(grad_value, query)
    of_bias = grad_bias
    if grad_bias is not None and grad_bias.shape[:2] != query.shape[:2]:
        of_bias = grad_bias.new_empty(batch, heads, receivers, senders)
    shared_edge = grad_edge is not None and grad_edge.shape[:2] != query.shape[:2]
    own_edge = None if shared_edge else grad_edge
    of_receivers = any(x is not None for x in (grad_query, grad_factor, own_edge, grad_bias))
    of_senders = any(x is not None for x in (grad_key, grad_value, grad_sender_gate))
    # Operands of tensor cores have lost more precision than a plain sum of dO O does.
    by_itself = launch.arithmetic_of(query.dtype, precision) in ("ieee", "float64")
    of_scores = grad_query, grad_key, grad_edge, grad_bias, grad_sender_gate
    needs_deltas = by_itself and any(x is not None for x in of_scores)
    constants, options = _setting(query, value, precision, "backward")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        **_matrices("edge", edge),
        **_matrices("neighbors", _mask(neighbors, query)),
        **_more(bias, sender_gate, seed, clamp, dropout),
        "factor": None if grad_new_edge is None or factor is None else factor.to(saved.dtype).contiguous(),
        "output": output,
        "grad_output": grad_output,
        **_matrices("grad_new_edge", grad_new_edge),
        "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
        "saved": saved,
        "deltas": torch.empty_like(saved[0]) if needs_deltas else None,
        "grad_query": grad_query,
        "grad_key": of_key,
        "grad_value": of_value,
        "grad_edge": grad_edge,
        "grad_factor": grad_factor,
        "grad_bias": of_bias,
        "grad_sender_gate": grad_sender_gate,
        "plane": batch * heads * receivers,
        "batches": batch,
        "heads": heads,
        "group": heads // key.shape[1],
        "receivers": receivers,
        "senders": senders,
        "edge_batches": 1 if edge is None else edge.shape[0],
        "edge_heads": 1 if edge is None else edge.shape[1],
        "zero": 0,
        **launch.strides(
            query=query,
            key=key,
            value=value,
            output=output,
            gradient=query if grad_query is None else grad_query,
            key_gradient=key if of_key is None else of_key,
            value_gradient=value if of_value is None else of_value,
        ),
        "scale_bits": launch.bits(scale),
        "ALL_PAIRS": all_pairs and grad_new_edge is not None,
        "SHARED_EDGE": shared_edge,
        "RECEIVERS": of_receivers,
        "SENDERS": of_senders,
        **constants,
    }
    pairs = batch * heads
    receiver_blocks, sender_blocks = (triton.cdiv(size, constants["BLOCK"]) for size in (receivers, senders))
    if needs_deltas:
        programs = pairs * receiver_blocks
        launch.launch(_sum_deltas, (programs,), launch.taken(_sum_deltas, arguments), options, query.device)
    programs = pairs * (of_receivers * receiver_blocks + of_senders * sender_blocks)
    if shared_edge and grad_edge is not None:
        steps = triton.cdiv(senders, constants["SHARED_STEP"])
        programs += grad_edge.shape[0] * grad_edge.shape[1] * receiver_blocks * steps
    if programs:
        launch.launch(_backward, (programs,), arguments, options, query.device)
    sum_heads(of_key, grad_key)
    sum_heads(of_value, grad_value)
    if of_bias is not None and grad_bias is not None and of_bias is not grad_bias:
        shared = [d for d in (0, 1) if grad_bias.shape[d] == 1]
        torch.sum(of_bias, shared, keepdim=True, out=grad_bias)
