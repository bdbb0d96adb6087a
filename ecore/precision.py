"""The arithmetic of a model's passes."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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


Trial = Callable[[torch.device, Sequence[str]], dict[str, float]]
"""Seconds of the same work in each precision, on a device."""

TRIAL_ROWS, TRIAL_LAYERS = 128, ((1200, 300), (300, 1200), (2048, 300))
"""Words of the trial's batch, and its layers: outputs and inputs."""
TRIAL_SECONDS, TRIAL_ROUNDS = 1.0, 9
"""The trial ends after either; each precision passes twice at least, the first time to warm up."""
LOSES = 1.05
"""A precision that takes this many times as long as float32 loses."""


def trial(device: torch.device, precisions: Sequence[str]) -> dict[str, float]:
    """Time a forward and a backward pass of a few layers in each precision, in turn, for about a second.

    Layers are of the paper's sizes: two of a feed-forward block, and a share of the output layer.
    """
    x = _numbers(TRIAL_ROWS, TRIAL_LAYERS[0][1]).to(device)
    weights = [_numbers(*layer).to(device).requires_grad_() for layer in TRIAL_LAYERS]
    seconds: dict[str, list[float]] = {precision: [] for precision in precisions}
    started = time.perf_counter()
    for turn in range(TRIAL_ROUNDS + 1):
        for precision in precisions:
            begin = time.perf_counter()
            with float32_products(device.type, precision), torch.enable_grad():
                with autocast(device.type, precision, keep_casts=True):
                    y = x
                    for weight in weights:
                        y = F.relu(F.linear(y, weight))
                    loss = y.float().square().mean()
                torch.autograd.grad(loss, weights)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[precision].append(time.perf_counter() - begin)
        if turn and time.perf_counter() - started > TRIAL_SECONDS:
            break
    return {precision: statistics.median(times) for precision, times in seconds.items()}


def _numbers(rows: int, columns: int) -> Tensor:
    """The same numbers always: torch's generator belongs to the training."""
    return torch.linspace(-1.0, 1.0, rows * columns).reshape(rows, columns)


def settle(precision: str, device: torch.device, measure: Trial = trial) -> tuple[str, str | None]:
    """Find the precision to train in, and a line for the user where there is something to say.

    Args:
        precision: of :class:`ecore.config.TrainingConfig`. "auto" takes the fastest of float32, bfloat16 and on a GPU
            tf32. Any other stays; one that loses to float32 on this CPU is said so.
        device: where the training will be.
        measure: times precisions.
    """
    if precision == "auto":
        candidates = ("float32", "bfloat16") if device.type == "cpu" else ("float32", "tf32", "bfloat16")
        seconds = measure(device, candidates)
        best = min(candidates, key=seconds.__getitem__)
        others = ", ".join(
            f"{name} takes {seconds[name] / seconds[best]:.1f} times as long"
            for name in candidates
            if name != best
        )
        return best, f"--precision auto: {best} has the fastest products here, by a trial ({others})"
    if device.type != "cpu" or precision in PRODUCTS:
        return precision, None
    seconds = measure(device, ("float32", precision))
    ratio = seconds[precision] / seconds["float32"]
    if ratio < LOSES:
        return precision, None
    return precision, (
        f"--precision {precision}: products take {ratio:.1f} times as long as in float32 on this CPU, by a trial; "
        "--precision auto takes the fastest"
    )


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
