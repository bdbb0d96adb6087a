"""Types of the operators' products, sums and results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def node_type(nodes: Sequence[Tensor], *weights: Tensor | None) -> torch.dtype:
    """The type in which queries, keys and values are multiplied: their common type; float64 if a weight is."""
    kind = nodes[0].dtype
    for tensor in nodes:
        if tensor.dtype is not kind:
            kind = torch.promote_types(kind, tensor.dtype)
    return torch.float64 if any(w is not None and w.dtype is torch.float64 for w in weights) else kind


def kernel_type(kind: torch.dtype, backend: str) -> torch.dtype:
    """The type of nodes that a backend's kernels take: a CPU has no units for half precision."""
    return torch.float32 if backend == "native" and kind in _HALF else kind


def weight_type(kind: torch.dtype) -> torch.dtype:
    """The type of edge weights, row factors and sums for nodes of type ``kind``."""
    return torch.float64 if kind is torch.float64 else torch.float32


def common_type(*nodes: Tensor) -> torch.dtype:
    """The type that tensors of these types promote to."""
    kind = nodes[0].dtype
    for tensor in nodes[1:]:
        kind = torch.promote_types(kind, tensor.dtype)
    return kind
