"""The arithmetic of a model's passes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

KEPT_KERNELS = 48
"""Shapes of low-precision products whose kernels a CPU keeps: about those of one step."""

PRODUCTS = ("float32", "tf32")
"""Precisions that need no autocast: they differ in how a GPU multiplies float32 matrices."""


@contextlib.contextmanager
def float32_products(device: str, precision: str) -> Iterator[None]:
    """Multiply float32 matrices on ``device`` as ``precision`` says, until the context ends.

    "tf32" lets a GPU's tensor cores multiply: operands are rounded to 10 bits of mantissa, sums stay float32. The graph
    operators follow the same setting. Every other precision is IEEE float32, and on a CPU so is "tf32". PyTorch's fused
    attention has no such setting: it always splits float32 into tf32 parts, with about float32's error.

    The setting belongs to the process: all threads share it, among them those of autograd's backward pass.

    Args:
        device: "cpu" or "cuda".
        precision: of :class:`ecore.config.TrainingConfig`.
    """
    # Since torch 2.9 there are two ways to set it; after the newer one, the older may refuse to be read.
    settings: list[Any] = [getattr(b, "matmul", None) for b in (torch.backends.cuda, torch.backends.mkldnn)]
    settings = [setting for setting in settings if hasattr(setting, "fp32_precision")]
    newer = [setting.fp32_precision for setting in settings]
    older = None
    with contextlib.suppress(RuntimeError):
        older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" and device != "cpu" else "highest")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for setting, value in zip(settings, newer, strict=True):
            setting.fp32_precision = value


def autocast(device: str, precision: str, keep_casts: bool = True) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass in ``precision`` stands in: torch.autocast, and nothing for :data:`PRODUCTS`.

    On a CPU, oneDNN compiles kernels of 1 to 2 MB for each shape of a product in low precision and keeps those of
    1,024. Batches have new shapes all the time: a training would take 2 GB for kernels that hardly come again. So it
    keeps :data:`KEPT_KERNELS`, unless the environment says otherwise. oneDNN reads that when its first product comes.

    Args:
        device: "cpu" or "cuda".
        precision: of :class:`ecore.config.TrainingConfig`.
        keep_casts: keep weights that were cast until the pass is over.
    """
    if precision in PRODUCTS:
        return contextlib.nullcontext()
    if device == "cpu":
        # oneDNN's, and that of torch before it.
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, str(KEPT_KERNELS))
    return torch.autocast(device, getattr(torch, precision), cache_enabled=keep_casts)
