"""Dropout, residual and LayerNorm on a GPU: ``kernels`` has both directions, ``launcher`` their launches."""

from __future__ import annotations

from ecore_kernels.triton_kernels.dropout_add_layer_norm.launcher import backward, forward

__all__ = ["backward", "forward"]
