"""Attention over a sparse graph on a GPU: ``kernels`` has both directions, ``launcher`` their launches."""

from __future__ import annotations

from ecore_kernels.triton_kernels.sparse_attention.launcher import backward, forward

__all__ = ["backward", "forward"]
