"""Attention on the emotion graph, forward and backward, without any N x N tensor.

An edge is recomputed, tile by tile, from what determines it: E_ij = E0_ij * r_i * prod_m u^m_ij, where u^m_ij = 1 +
scale * q^m_i . k^m_j comes from an earlier layer m (Eqs. 5 and 7 unrolled). docs/kernels.md derives the gradients.

``edges`` has what forward and backward have in common; ``forward_kernel``, ``deltas_kernel`` and ``backward_kernel``
are the kernels, ``receivers`` and ``senders`` the two halves of the last, with ``gradients`` for both; ``launcher``
launches them.
"""

from __future__ import annotations

from ecore_kernels.triton_kernels.graph_attention.launcher import backward, forward

__all__ = ["backward", "forward"]
