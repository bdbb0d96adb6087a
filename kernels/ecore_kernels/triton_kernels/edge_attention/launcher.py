"""Launches of attention on any dense graph: what the kernels read, and where they write.

Arguments and results are those of ``_results`` and ``_gradients`` in :mod:`ecore_kernels.operators.edge_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ecore_kernels.layout import dense_rows, laid_out_like
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.edge_attention.backward_kernels import _backward, _sum_deltas
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
    """The neighbours as the kernels load them: where the rest is float64, not as bytes.

    The compiler packs the operands of a product as tightly as the narrowest load that they depend on, and does not
    compile for sm_80 and sm_90 when it takes four numbers of 64 bits for as many bytes.
    """
    return neighbors.to(torch.int32) if neighbors is not None and query.dtype is torch.float64 else neighbors


def _matrices(name: str, tensor: Tensor | None) -> dict[str, Tensor | int | None]:
    """Kernel arguments: [B or 1, K or 1, N, N] and its strides; copied unless a row lies side by side."""
    if tensor is None:
        return {name: None, f"{name}_batch": 0, f"{name}_head": 0, f"{name}_row": 0}
    if tensor.shape[3] > 1 and tensor.stride(3) != 1:
        tensor = tensor.contiguous()
    batch, head = (0 if tensor.shape[i] == 1 else tensor.stride(i) for i in (0, 1))
    return {name: tensor, f"{name}_batch": batch, f"{name}_head": head, f"{name}_row": tensor.stride(2)}


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    factor: Tensor | None,
    scale: float,
    precision: str,
    results: Sequence[Tensor],
) -> None:
    """Launch the forward kernel."""
    batch, resolutions, nodes, _ = query.shape
    output, new_edge, saved = results
    query, value = dense_rows(query), dense_rows(value)
    key = laid_out_like(key, query)
    constants, options = _setting(query, value, precision, "forward")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        **_matrices("edge", edge),
        **_matrices("neighbors", _mask(neighbors, query)),
        "factor": None if factor is None else factor.to(saved.dtype).contiguous(),
        "new_edge": None if factor is None else new_edge,
        "output": output,
        "saved": saved,
        "plane": batch * resolutions * nodes,
        "resolutions": resolutions,
        "nodes": nodes,
        **launch.strides(query=query, value=value, output=output),
        "scale_bits": launch.bits(scale),
        **constants,
    }
    programs = batch * resolutions * triton.cdiv(nodes, constants["BLOCK"])
    launch.launch(_forward, (programs,), arguments, options, query.device)


def backward(
    grad_output: Tensor,
    grad_new_edge: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    factor: Tensor | None,
    output: Tensor,
    saved: Tensor,
    scale: float,
    needs: list[bool],
    precision: str,
    results: Sequence[Tensor | None],
) -> None:
    """Launch the backward kernel."""
    batch, resolutions, nodes, _ = query.shape
    grad_query, grad_key, grad_value, grad_edge, grad_factor = results
    query, value = dense_rows(query), dense_rows(value)
    key = laid_out_like(key, query)
    grad_output = laid_out_like(grad_output, output)
    if grad_factor is not None and grad_new_edge is None:
        grad_factor.zero_()
        grad_factor = None
    shared_edge = grad_edge is not None and edge.shape[:2] != query.shape[:2]
    of_receivers = any(x is not None for x in (grad_query, grad_factor, None if shared_edge else grad_edge))
    of_senders = grad_key is not None or grad_value is not None
    # Tensor cores' operands have lost more than a plain sum of dO O does.
    by_itself = launch.arithmetic_of(query.dtype, precision) in ("ieee", "float64")
    needs_deltas = by_itself and any(x is not None for x in (grad_query, grad_key, grad_edge))
    constants, options = _setting(query, value, precision, "backward")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        **_matrices("edge", edge),
        **_matrices("neighbors", _mask(neighbors, query)),
        "factor": None if grad_new_edge is None or factor is None else factor.to(saved.dtype).contiguous(),
        "output": output,
        "grad_output": grad_output,
        **_matrices("grad_new_edge", grad_new_edge),
        "saved": saved,
        "deltas": torch.empty_like(saved[0]) if needs_deltas else None,
        "grad_query": grad_query,
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_edge": grad_edge,
        "grad_factor": grad_factor,
        "plane": batch * resolutions * nodes,
        "batches": batch,
        "resolutions": resolutions,
        "nodes": nodes,
        "edge_batches": edge.shape[0],
        "edge_resolutions": edge.shape[1],
        "zero": 0,
        **launch.strides(
            query=query,
            value=value,
            output=output,
            gradient=next((x for x in (grad_query, grad_key) if x is not None), query),
            value_gradient=value if grad_value is None else grad_value,
        ),
        "scale_bits": launch.bits(scale),
        "SHARED_EDGE": shared_edge,
        "RECEIVERS": of_receivers,
        "SENDERS": of_senders,
        **constants,
    }
    blocks = triton.cdiv(nodes, constants["BLOCK"])
    if needs_deltas:
        programs = batch * resolutions * blocks
        launch.launch(_sum_deltas, (programs,), launch.taken(_sum_deltas, arguments), options, query.device)
    programs = (of_receivers + of_senders) * batch * resolutions * blocks
    if shared_edge:
        programs += edge.shape[0] * edge.shape[1] * blocks * triton.cdiv(nodes, constants["SHARED_STEP"])
    if programs:
        launch.launch(_backward, (programs,), arguments, options, query.device)
