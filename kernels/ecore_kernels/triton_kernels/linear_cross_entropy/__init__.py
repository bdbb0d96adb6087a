"""Passes over the logits of a cross entropy on a GPU: ``kernels`` has them, ``launcher`` their launches."""

from __future__ import annotations

from ecore_kernels.triton_kernels.linear_cross_entropy.launcher import forward

__all__ = ["forward"]
