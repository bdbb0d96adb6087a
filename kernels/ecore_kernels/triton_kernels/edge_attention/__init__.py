"""Attention on any dense graph, its scores multiplied by edge weights that lie in memory: forward and backward.

With s = scale * q k^T and x = s * E: out = softmax over neighbours (x) v, new_edge = f * (E + x) (Eqs. 4 to 7), f one
factor per receiver. Nothing off the graph is read, neither edges nor gradients of updated edges.

``edges`` has what forward and backward have in common, ``forward_kernel``, ``deltas_kernel`` and ``backward_kernel``
the kernels, ``launcher`` their launches.
"""

from __future__ import annotations

from ecore_kernels.triton_kernels.edge_attention.launcher import backward, forward

__all__ = ["backward", "forward"]
