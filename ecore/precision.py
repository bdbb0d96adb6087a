"""The arithmetic of a model's passes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


def autocast(device: str, precision: str, keep_casts: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a forward pass in ``precision``: torch.autocast, or none for :data:`PRODUCTS`.

    On a CPU, oneDNN compiles kernels of 1 to 2 MB for each shape of a product in low precision and keeps those of
    1,024. Batches have new shapes all the time: a training would take 2 GB for kernels that hardly come again. So it
    keeps :data:`KEPT_KERNELS`, unless the environment says otherwise. oneDNN reads that when its first product comes.

    Args:
        device: "cpu" or "cuda".
        precision: of :class:`ecore.config.TrainingConfig`.
        keep_casts: keep weights that autocast casts until the pass is over: without :class:`LowWeights`, and where no
            pass is recorded, for the kept ones would be the recording's.
    """
    if precision in PRODUCTS:
        return contextlib.nullcontext()
    if device == "cpu":
        # oneDNN's, and that of torch before it.
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, str(KEPT_KERNELS))
    return torch.autocast(device, getattr(torch, precision), cache_enabled=keep_casts)


class LowWeights:
    """The weights of a model's products in low precision, all cast at once.

    Within the context that a call gives, layers have copies of their weights in ``precision``, which autocast takes as
    they are. Gradients reach the weights themselves, in their own type. Autocast alone launches a kernel a weight:
    once a pass where it may keep what it cast, and in a recorded step at every use.

    What is not the weight of a linear layer stays as it is, and so does a weight that is also a table of embeddings or
    the output layer's: :func:`ecore.model.losses.vocabulary_losses` casts it once and sums its gradient in float32.

    Args:
        model: whose layers; its parameters may be loaded or moved later.
        precision: of :class:`ecore.config.TrainingConfig`; contexts of :data:`PRODUCTS` change nothing.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        self._places: list[tuple[MutableMapping[str, Any], str]] = []
        if precision in PRODUCTS:
            return
        self._dtype: torch.dtype = getattr(torch, precision)
        output, modules = getattr(model, "output", None), list(model.modules())
        cast = [module for module in modules if _is_linear(module) and module is not output]
        others = set(modules) - set(cast)
        kept = {id(weight) for module in others for weight in module.parameters(recurse=False)}
        self._places = [
            (module._parameters, name)
            for module in cast
            for name, weight in module.named_parameters(recurse=False)
            if id(weight) not in kept
        ]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Put copies into the layers, until the context ends; backward may come within it or later."""
        if not self._places:
            yield
            return
        weights = [parameters[name] for parameters, name in self._places]
        different = list({id(weight): weight for weight in weights}.values())
        copies = dict(zip(map(id, different), _Cast.apply(self._dtype, *different), strict=True))
        try:
            for (parameters, name), weight in zip(self._places, weights, strict=True):
                parameters[name] = copies[id(weight)]
            yield
        finally:
            for (parameters, name), weight in zip(self._places, weights, strict=True):
                parameters[name] = weight


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module only multiplies by its weight and adds its bias; Conv1D is GPT-2's."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class _Cast(torch.autograd.Function):
    """Tensors in another type, and their gradients back, each way in one call for all of them."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(_copied(weights, [dtype] * len(weights)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used = {i: grad for i, grad in enumerate(grads) if grad is not None}
        wide = _copied(list(used.values()), [ctx.dtypes[i] for i in used])
        found = dict(zip(used, wide, strict=True))
        return (None, *(found.get(i) for i in range(len(grads))))


def _copied(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Copies of tensors, each in its type."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def for_products(x: Tensor) -> Tensor:
    """``x`` in the type that autocast multiplies in: for what several layers read, each of which would cast it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
