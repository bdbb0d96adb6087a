"""The arithmetic of a training's forward pass."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

KEPT_KERNELS = 48
"""Shapes of low-precision products whose kernels a CPU keeps: about those of one step."""


def autocast(device: str, precision: str, keep_casts: bool = True) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass in ``precision`` stands in: torch.autocast, and for "float32" nothing.

    On a CPU, oneDNN compiles kernels of 1 to 2 MB for each shape of a product in low precision and keeps those of
    1,024. Batches have new shapes all the time: a training would take 2 GB for kernels that hardly come again. So it
    keeps :data:`KEPT_KERNELS`, unless the environment says otherwise. oneDNN reads that when its first product comes.

    Args:
        device: "cpu" or "cuda".
        precision: "float32", "bfloat16" or "float16".
        keep_casts: keep weights that were cast until the pass is over.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    if device == "cpu":
        # oneDNN's, and that of torch before it.
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, str(KEPT_KERNELS))
    return torch.autocast(device, getattr(torch, precision), cache_enabled=keep_casts)
