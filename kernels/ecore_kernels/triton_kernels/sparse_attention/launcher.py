"""Launches of attention over a sparse graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels.dtypes import weight_type
from ecore_kernels.layout import rows_together
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.sparse_attention.kernels import _forward, _receivers, _senders

NAMES = ("query", "key", "value", "edge", "bias", "key_scale", "key_offset", "value_offset")
BYTES_A_WARP = 2048
"""Bytes of a step's tile of keys or values that one warp holds in registers: four such tiles are alive at a time."""


@functools.lru_cache(maxsize=4096)
def _strides(
    names: tuple[str, ...], strides: tuple[tuple[int, ...], ...], element_size: int
) -> dict[str, int]:
    """Kernel arguments: strides over nodes or edges and over heads; those of rows in units of VECTOR elements.

    See :func:`launch.strides`.
    """
    of_rows = [stride for of in strides if len(of) == 3 for stride in of[:2]]
    vector = math.gcd(launch.FULL_VECTOR // element_size, *of_rows)
    arguments = {"VECTOR": vector}
    for name, of in zip(names, strides, strict=True):
        unit = vector if len(of) == 3 else 1
        arguments |= {f"{name}_node": of[0] // unit, f"{name}_head": of[1] // unit} if of else {}
    return arguments


def _given(tensors: dict[str, Tensor | None], scale: float) -> tuple[dict[str, object], dict[str, int]]:
    """The kernels' arguments that depend on the inputs only, and the compiler's options."""
    query, value = tensors["query"], tensors["value"]
    assert query is not None
    assert value is not None
    tile, value_tile = launch.padded(query.shape[2]), launch.padded(value.shape[2])
    widest = max(tile, value_tile)
    edges = 16 if widest <= 32 else 8 if widest <= 128 else 4
    size = weight_type(query.dtype).itemsize
    strides = _strides(
        tuple(tensors),
        tuple(() if x is None else x.stride() for x in tensors.values()),
        min(x.element_size() for x in tensors.values() if x is not None),
    )
    arguments = dict.fromkeys((f"{n}_{d}" for n in tensors for d in ("node", "head")), 0) | strides
    return {
        **tensors,
        **arguments,
        "heads": query.shape[1],
        "scale_bits": launch.bits(scale),
        "EDGES": edges,
        "DIM": query.shape[2],
        "TILE": tile,
        "VALUE_DIM": value.shape[2],
        "VALUE_TILE": value_tile,
    }, {"num_warps": min(16, max(1, edges * widest * size // BYTES_A_WARP)), "num_stages": 2}


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    bias: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_offset: Tensor | None,
    sender: Tensor,
    receiver: Tensor,
    receiver_begin: Tensor,
    by_receiver: Tensor,
    sender_begin: Tensor,
    by_sender: Tensor,
    scale: float,
    results: Sequence[Tensor],
) -> None:
    """Launch the forward kernel."""
    output, weight = results
    if not output.numel():
        return
    inputs = (query, key, value, edge, bias, key_scale, key_offset, value_offset)
    arguments, options = _given(dict(zip(NAMES, map(rows_together, inputs), strict=True)), scale)
    graph = {"sender": sender, "receiver_begin": receiver_begin, "by_receiver": by_receiver}
    arguments |= {name: x.contiguous() for name, x in graph.items()}
    arguments |= {"score": torch.empty_like(weight), "weight": weight, "output": output}
    launch.launch(_forward, (query.shape[0] * query.shape[1],), arguments, options, query.device)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    bias: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_offset: Tensor | None,
    sender: Tensor,
    receiver: Tensor,
    receiver_begin: Tensor,
    by_receiver: Tensor,
    sender_begin: Tensor,
    by_sender: Tensor,
    weight: Tensor,
    scale: float,
    needs: list[bool],
    results: Sequence[Tensor | None],
) -> None:
    """Launch the kernels of receivers and of senders."""
    inputs = (query, key, value, edge, bias, key_scale, key_offset, value_offset, grad_output)
    arguments, options = _given(dict(zip((*NAMES, "sent"), map(rows_together, inputs), strict=True)), scale)
    graph = {"sender": sender, "receiver_begin": receiver_begin, "by_receiver": by_receiver}
    graph |= {"receiver": receiver, "sender_begin": sender_begin, "by_sender": by_sender}
    arguments |= {name: x.contiguous() for name, x in graph.items()}
    arguments |= {
        "weight": weight,
        "grad_weight": torch.empty_like(weight),
        "grad_score": torch.empty_like(weight),
    }
    arguments |= {f"grad_{name}": gradient for name, gradient in zip(NAMES, results, strict=True)}
    heads = query.shape[1]
    for kernel, nodes, wanted in (
        (_receivers, query.shape[0], [*results[:2], *results[3:]]),  # a key's gradient needs those of scores
        (_senders, key.shape[0], results[1:3]),
    ):
        if nodes * heads and any(x is not None for x in wanted):
            launch.launch(kernel, (nodes * heads,), launch.taken(kernel, arguments), options, query.device)
