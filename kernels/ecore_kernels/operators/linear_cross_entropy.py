"""A linear layer and the cross entropy of its outputs in one, without the logits of all rows at once."""

from __future__ import annotations

import numbers
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import backends, reference
from ecore_kernels.dtypes import common_type
from ecore_kernels.operators import registration
from ecore_kernels.operators.batching import one_by_one
from ecore_kernels.operators.checks import (
    check_floats,
    check_number,
    check_one_device,
    check_shape,
    check_tensors,
)
from ecore_kernels.operators.plans import has_static_value, without_autocast
from ecore_kernels.refusals import shown, wants_gradient

registration.library.define(
    "fused_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor? gate, Tensor? scores, "
    "Tensor target, Tensor? classes, Tensor? slots, float label_smoothing, int? smoothing_classes, int ignore_index, "
    "float scale, bool mean, bool[] needs, ScalarType kind, str backend) -> (Tensor loss, Tensor nll, "
    "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_gate, Tensor grad_scores)"
)


def _results(
    hidden,
    weight,
    bias,
    gate,
    scores,
    target,
    classes,
    slots,
    label_smoothing,
    smoothing_classes,
    ignore_index,
    scale,
    mean,
    needs,
    kind,
):
    """Allocate the results.

    Args:
        hidden: [T, D]; weight: [V, D]; bias: [V] or None; target: [T] int64.
        gate: [T], scores, classes and slots: [T, S]: the arguments of copying (:mod:`ecore_kernels.copying`); all None
            without it.
        label_smoothing, smoothing_classes, ignore_index: of the public function.
        scale: factor on the loss.
        mean: divide the loss by the number of targets that are not ignored.
        needs: which of the gradients of hidden, weight, bias, gate and scores are wanted.
        kind: the type of products.

    Returns:
        loss: scalar; nll: [T]; both in float32, or in float64 where the products are.
        gradients of the loss by hidden, weight, bias, gate and scores, in their types; empty where not wanted.
    """
    exact = torch.promote_types(kind, torch.float32)
    inputs = (hidden, weight, bias, gate, scores)
    gradients = [
        x.new_empty(x.shape) if needed and x is not None else hidden.new_empty(0)
        for x, needed in zip(inputs, needs, strict=True)
    ]
    return (hidden.new_empty((), dtype=exact), hidden.new_empty(hidden.shape[:1], dtype=exact), *gradients)


registration.register("linear_cross_entropy", "forward", _results)


def _one_by_one(info: Any, dims: Any, *arguments: Any) -> Any:
    return one_by_one(torch.ops.ecore_kernels.fused_linear_cross_entropy)(info, dims, *arguments)


torch.library.register_vmap(
    "ecore_kernels::fused_linear_cross_entropy", _one_by_one, lib=registration.library
)


def _forward(setting, tensors):
    hidden, weight, bias, gate, scores, target, classes, slots = tensors
    arguments = (hidden, weight, bias, gate, scores, target, classes, slots, *setting)
    return registration.run("linear_cross_entropy", "forward", tensors, arguments)


def _backward(setting, needs, gradients, tensors, kept):
    (grad,) = gradients
    wanted = list(compress(kept, needs))  # torch 2.7 traces no zip of unequal lengths
    # On a CPU the check is free, and saves a pass over a gradient as large as the weight.
    plain = type(grad) is Tensor and not registration.dispatches((grad,))
    if plain and grad.device.type == "cpu" and grad.item() == 1.0:
        return wanted
    return [(x * grad).to(x.dtype) for x in wanted]


def _reference(setting, tensors):
    hidden, weight, bias, gate, scores, target, classes, slots = tensors
    label_smoothing, smoothing_classes, ignore_index, scale, mean, *_ = setting
    loss, _ = reference.linear_cross_entropy(
        hidden, weight, bias, target, label_smoothing, smoothing_classes, ignore_index, mean,
        None if gate is None else (gate, scores, classes, slots),
    )  # fmt: skip
    return (scale * loss,)


registration.OPERATORS["linear_cross_entropy"] = registration.FusedOperator(
    _forward,
    _backward,
    _reference,
    1,
    (2, 3, 4, 5, 6),
    lambda _: ["hidden", "weight", "bias", "gate", "scores", "target", "classes", "slots"],
)


# The public function -----------------------------------------------------------------------------------------


def _check(
    hidden: Any,
    weight: Any,
    bias: Any,
    target: Any,
    label_smoothing: float = 0.0,
    smoothing_classes: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> None:
    """Raise ValueError unless the arguments fit each other."""
    name = "linear_cross_entropy"
    check_floats(name, hidden=hidden, weight=weight)
    if hidden.dim() != 2:
        raise ValueError(f"{name}: hidden: expected [T, D], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}: weight: expected [V, {hidden.shape[1]}] with V >= 1, got {list(weight.shape)}"
        )
    if bias is not None:
        check_floats(name, bias=bias)
        check_shape(name, "bias", bias, weight.shape[:1])
    check_tensors(name, target=target)
    check_shape(name, "target", target, hidden.shape[:1])
    if target.dtype is not torch.int64:
        raise ValueError(f"{name}: target: expected int64, got {str(target.dtype).removeprefix('torch.')}")
    check_one_device(name, hidden, weight, bias, target)
    check_number(name, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing: expected 0 to 1, got {label_smoothing}")
    if smoothing_classes is not None:
        check_number(name, "smoothing_classes", smoothing_classes)
        if label_smoothing and smoothing_classes < 1:
            raise ValueError(f"{name}: smoothing_classes: expected at least 1, got {smoothing_classes}")
    if not isinstance(ignore_index, numbers.Integral):
        raise ValueError(f"{name}: ignore_index: expected an int, got {shown(ignore_index)}")
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction: expected mean or sum, got {shown(reduction)}")


def scaled_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    smoothing_classes: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    copies: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`linear_cross_entropy` with a factor on the loss, and with copying.

    Args:
        scale: factor on the loss. Applied later, it would cost a pass over the weight's gradient.
        copies: gate [T], scores, classes and slots [T, S]. With them the loss is that of the mixture of generating and
            copying (:mod:`ecore_kernels.copying`).
    """
    _check(hidden, weight, bias, target, label_smoothing, smoothing_classes, ignore_index, reduction, backend)
    chosen = backends.choose("linear_cross_entropy", backend, hidden, weight, bias, target)
    device, mean = hidden.device, reduction == "mean"
    kind = common_type(hidden, weight)
    # Tensors without data ("meta") have no autocast, and asking for it raises.
    cast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if cast and kind is not torch.float64:
        kind = torch.get_autocast_dtype(device.type)
    with without_autocast(device, kind if cast else None):
        # torch.jit.trace records no list of bool.
        if backends.differentiates_forward() or torch._C._get_tracing_state() is not None:
            loss, nll = reference.linear_cross_entropy(
                hidden, weight, bias, target, label_smoothing, smoothing_classes, ignore_index, mean, copies
            )
            return scale * loss, nll
        gate, scores, classes, slots = copies or (None, None, None, None)
        wanting = torch.is_grad_enabled()
        needs = tuple(
            wanting and x is not None and wants_gradient(x) for x in (hidden, weight, bias, gate, scores)
        )
        factor = scale if has_static_value(scale) else 1.0
        loss, nll, *_ = registration.apply(
            "linear_cross_entropy",
            (label_smoothing, smoothing_classes, ignore_index, factor, mean, needs, kind, chosen),
            hidden, weight, bias, gate, scores, target, classes, slots,
        )  # fmt: skip
        # torch.compile would recompile the operator for every value of a number that it has found to vary.
        return loss if factor is scale else loss * scale, nll


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    smoothing_classes: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear layer and the cross entropy of its outputs in one, without the logits of all rows at once.

    With ``x = hidden @ weight^T + bias``, the loss of a row is ``-sum_w goal_w log softmax(x)_w``. In that sum,
    ``goal`` has ``1 - label_smoothing`` at the target y and spreads the rest:

    * by default over all V classes, the target's among them, as ``torch.nn.functional.cross_entropy`` does:
      ``goal_w = label_smoothing / V``, plus ``1 - label_smoothing`` for w = y;
    * with ``smoothing_classes=C`` over the other classes: ``goal_y = 1 - label_smoothing``, ``goal_w =
      label_smoothing / C`` elsewhere, and 0 for the class ``ignore_index`` if that is one of the V. With
      ``ignore_index`` the padding and C = V - 2 this is the published ``LabelSmoothing`` of the Annotated Transformer,
      MoEL and code after them, which leaves out target and padding. Theirs is a KL divergence: it has in addition
      ``sum_w goal_w log goal_w`` for each row, a constant without gradient.

    Logits are computed for a chunk of rows at a time. If a gradient is wanted, the chunk's share is computed from the
    same logits, and the backward only scales it: three matrix products, none of them repeated.

    Args:
        hidden: [T, D].
        weight: [V, D].
        bias: [V], or None.
        target: [T] int64, 0 to V - 1, or ``ignore_index``: rows without loss and gradient.
        label_smoothing: 0 to 1.
        smoothing_classes: C above; None for the first form.
        ignore_index: targets to leave out.
        reduction: "mean" over targets that are not left out, or "sum".
        backend: "reference", "native", "triton"; None takes the fastest that can run the call.

    Returns:
        loss: scalar. As with torch, the mean of no target is NaN, its gradients are 0.
        nll: [T], -log softmax(x)_y without smoothing, 0 where left out; not differentiable.

        Both are float32 at least. Under autocast the products are in its type; nothing else changes.

    Gradients reach hidden, weight and bias, and can be differentiated again (by whole logits in plain PyTorch).

    Raises:
        ValueError: a shape or a type that does not fit; on a CPU also a target out of range. On a GPU, where the check
            would synchronise, such a row's loss is NaN.
        RuntimeError: the named backend cannot run the call.
    """
    return scaled_losses(
        hidden,
        weight,
        bias,
        target,
        label_smoothing=label_smoothing,
        smoothing_classes=smoothing_classes,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
    )


backends.register("linear_cross_entropy", linear_cross_entropy, _check)
