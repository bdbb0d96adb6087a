"""Readout of the last edges' emotion columns (Eq. 8), forward and backward.

An edge is recomputed, tile by tile, from what determines it: E_ij = E0_ij * r_i * prod_m u^m_ij, where u^m_ij = 1 +
scale * q^m_i . k^m_j comes from an earlier layer m (Eqs. 5 and 7 unrolled). The readout is linear in it: with D the
gradient of whatever the edge is added to, the same at every resolution, dE0 = D r prod_m u^m, dr_i = sum_j D E0 prod_m
u^m, and du^m = D E0 r prod_{l != m} u^l.

Receivers are rows and senders columns. Rows are in their natural order, words and emotions in blocks of their own;
those that do not take part in a resolution are not loaded for it.

``edges`` has what forward and backward have in common, ``forward_kernel`` and ``backward_kernel`` the kernels,
``launcher`` their launches.
"""

from __future__ import annotations

from ecore_kernels.triton_kernels.edge_readout.launcher import backward, forward

__all__ = ["backward", "forward"]
