"""Registered operators: a fused kernel for each direction, and the autograd functions around the two.

The ``autograd.Function`` is outside of the registered operators, so that autograd, ``torch.func``, ``torch.compile``
and ``opcheck`` all see plain operators without derivatives of their own. It takes a flat sequence of tensors, those
that may need a gradient first: tensors in a list would get no gradient.

The operator allocates the results of both directions, one function for each: the fake implementation returns them as
they are, and a backend fills them. A backend's package has a module for each operator, with the functions ``forward``
and ``backward``, which take the registered operators' arguments (without ``backend``) and the results, and return
nothing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecore_kernels.operators.autograd import call, distinct
from ecore_kernels.operators.checks import check_saveable
from ecore_kernels.tracing import constant_result

_PACKAGES = {
    "triton": "ecore_kernels.triton_kernels",
    "native": "ecore_kernels.native_kernels",
    "reference": "ecore_kernels.reference_kernels",
}


library = torch.library.Library("ecore_kernels", "FRAGMENT")


@functools.cache
def kernels(backend: str, operator: str) -> ModuleType:
    """The module of a backend's kernels, imported when first needed: Triton is optional and slow to import."""
    return importlib.import_module(f"{_PACKAGES[backend]}.{operator}")


@constant_result  # torch.compile cannot trace the query
def _matmul_precision() -> str:
    """Return the precision of float32 products on a GPU: torch's setting."""
    # Since torch 2.9 this covers both ways to set tf32; ``get_float32_matmul_precision`` raises after the newer one.
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if chosen is None:
        chosen = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if chosen == "tf32" else "ieee"


def precision(backend: str) -> str:
    return "ieee" if backend == "native" else _matmul_precision()


@constant_result
def _inside_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()


class FusedOperator(NamedTuple):
    """One fused operator, as functions of its setting and its flat tensors."""

    forward: Callable[..., tuple[Tensor, ...]]
    """(setting, tensors) -> results."""
    backward: Callable[..., list[Tensor]]
    """(setting, needs, gradients of results, tensors, kept results) -> gradients of those that need one."""
    reference: Callable[..., tuple[Tensor, ...]]
    """(setting, tensors) -> the results that have gradients, in plain PyTorch."""
    differentiable: int
    """Number of results that have gradients; the others are only for the backward."""
    kept: tuple[int, ...]
    """The results that the backward needs."""
    names: Callable[[Any], list[str]]
    """(first of the setting) -> the flat tensors' names, for messages."""


OPERATORS: dict[str, FusedOperator] = {}


class _Fused(torch.autograd.Function):
    """An operator's two kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, setting, *tensors):
        return OPERATORS[name].forward(setting, tensors)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        name, setting, *tensors = inputs
        ctx.name, ctx.setting, ctx.inputs = name, setting, len(tensors)
        operator = OPERATORS[name]
        ctx.set_materialize_grads(False)  # else zeros are made for outputs that have no gradient
        ctx.save_for_backward(*tensors, *(outputs[i] for i in operator.kept))
        ctx.mark_non_differentiable(*outputs[operator.differentiable :])

    @staticmethod
    def backward(ctx, *gradients):
        operator = OPERATORS[ctx.name]
        gradients = gradients[: operator.differentiable]
        needs = ctx.needs_input_grad[2:]
        nothing = (None,) * (2 + len(needs))
        if all(g is None for g in gradients) or not any(needs):
            return nothing
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = call(_FusedBackward, ctx.name, ctx.setting, needs, ctx.inputs, *gradients, *saved)
        else:
            tensors, kept = saved[: ctx.inputs], saved[ctx.inputs :]
            found = operator.backward(ctx.setting, needs, gradients, tensors, kept)
        found = iter(found)
        return (None, None, *(next(found) if needed else None for needed in needs))


class _FusedBackward(torch.autograd.Function):
    """An operator's backward kernel, which can be differentiated again: by the reference, at the same inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, setting, needs, inputs, *tensors):
        operator = OPERATORS[name]
        gradients, tensors = tensors[: operator.differentiable], tensors[operator.differentiable :]
        return tuple(operator.backward(setting, needs, gradients, tensors[:inputs], tensors[inputs:]))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.name, ctx.setting, ctx.needs, count, *tensors = inputs
        ctx.save_for_backward(*tensors[: OPERATORS[ctx.name].differentiable + count])

    @staticmethod
    def backward(ctx, *gradients):
        operator, tensors = OPERATORS[ctx.name], ctx.saved_tensors
        results = operator.differentiable
        given = [i for i in range(results) if tensors[i] is not None]
        asked = [i + results for i, needed in enumerate(ctx.needs) if needed]
        # What the gradients depend on: the results' gradients, and every float input.
        leaves = [i for i, x in enumerate(tensors) if x is not None and x.is_floating_point()]

        def first(*values):
            now = list(tensors)
            for i, value in zip(leaves, values, strict=True):
                now[i] = value

            def outputs(*wanted):
                at = list(now)
                for i, value in zip(asked, wanted, strict=True):
                    at[i] = value
                found = operator.reference(ctx.setting, at[results:])
                return tuple(found[i].to(tensors[i].dtype) for i in given)

            _, pull = torch.func.vjp(outputs, *(now[i] for i in asked))
            return pull(tuple(now[i] for i in given))

        _, pull = torch.func.vjp(first, *(tensors[i] for i in leaves))
        found = dict(zip(leaves, pull(tuple(gradients)), strict=True))
        count = len(ctx.needs_input_grad) - 4
        return (None, None, None, None, *(found.get(i) for i in range(count)))


def apply(name: str, setting: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The operator's results, by ``_Fused.apply`` if a tensor requires a gradient, else by its forward alone.

    This is not only cheaper: without gradients torch.compile passes a context to a forward that takes any number of
    tensors.

    Raises:
        ValueError: an inference tensor, which cannot be saved for the backward.
        NotImplementedError: torch.func inside of compiled code, where no tensor seems to require a gradient:
            derivatives would be lost silently.
    """
    if torch.compiler.is_compiling():
        if _inside_torch_func():
            raise NotImplementedError(
                "no torch.func inside of compiled code for fused kernels; backend='reference' has it"
            )
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return call(_Fused, name, setting, *tensors)
        return OPERATORS[name].forward(setting, tensors)
    if torch._C._are_functorch_transforms_active():  # whose tensors hide whether they require a gradient
        return _Fused.apply(name, setting, *tensors)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                try:
                    return call(_Fused, name, setting, *tensors)
                except RuntimeError:
                    check_saveable(name, **dict(zip(OPERATORS[name].names(setting[0]), tensors, strict=True)))
                    raise
    return OPERATORS[name].forward(setting, tensors)


def apart(tensors: Sequence[Tensor], kind: torch.dtype) -> list[Tensor]:
    """The tensors in type ``kind``; for torch.compile no two of them are the same object."""
    result = [x if x.dtype is kind else x.to(kind) for x in tensors]
    return distinct(result) if torch.compiler.is_compiling() else result


def as_type(tensor: Tensor, kind: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is kind else tensor.to(kind)


PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Return True if a kernel can read a tensor by its address.

    False for a subclass, and for a view whose memory holds the negated numbers (``conj().imag`` is one): the dispatcher
    gives kernels its numbers.
    """
    return type(tensor) in PLAIN and not tensor.is_neg()


def is_observed() -> bool:
    """Return True if something sees the calls of this thread: a dispatch mode, a profiler, torch.jit.trace."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def dispatches(tensors: Sequence[Tensor | None]) -> bool:
    """Return True if a call on these must go through torch's dispatcher, because something may intercept it.

    The dispatcher takes longer than a small call's kernels. It is not needed for plain tensors outside of
    torch.compile, torch.func, dispatch modes (FakeTensorMode, FlopCounterMode, ...), profilers and torch.jit.trace.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or is_observed()
        or any(x is not None and not is_plain(x) for x in tensors)
    )


def run(operator: str, direction: str, tensors: Sequence[Tensor | None], arguments: tuple[Any, ...]) -> Any:
    """Run a backend's kernels, through torch's dispatcher where it :func:`dispatches`.

    Args:
        tensors: those of the call.
        arguments: those of the registered operator, the backend's name last.
    """
    if dispatches(tensors):
        name = f"fused_{operator}" if direction == "forward" else f"fused_{operator}_backward"
        return getattr(torch.ops.ecore_kernels, name)(*arguments)
    return compute(operator, direction, arguments)


ALLOCATORS: dict[tuple[str, str], Callable[..., Sequence[Tensor | None]]] = {}
"""By operator and direction: (the registered operator's arguments without ``backend``) -> its results, not yet filled.

A gradient that is not needed is None there.
"""


def compute(operator: str, direction: str, arguments: Sequence[Any]) -> Any:
    """Allocate the results of a registered operator, have the backend fill them, and return them.

    Args:
        arguments: those of the registered operator, the backend's name last.

    Returns:
        a tuple of the forward's results, or a list of the backward's that are needed.
    """
    *inputs, backend = arguments
    results = ALLOCATORS[operator, direction](*inputs)
    getattr(kernels(backend, operator), direction)(*inputs, results)
    return results if direction == "forward" else _needed(results)


def _needed(results: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in results if x is not None]


def schema_of(name: str) -> Any:
    """Return the schema of a registered operator."""
    return getattr(torch.ops.ecore_kernels, name).default._schema


def is_list(argument: Any) -> bool:
    """Return True if an argument of a schema is a list of tensors."""
    return str(argument.type) == "List[Tensor]"


def register(operator: str, direction: str, allocate: Callable[..., Sequence[Tensor | None]]) -> None:
    """Implement a registered operator: by ``allocate`` for tensors without data, else by a backend's kernels.

    Args:
        allocate: see :data:`ALLOCATORS`.
    """
    name = f"fused_{operator}" if direction == "forward" else f"fused_{operator}_backward"
    lists = [i for i, argument in enumerate(schema_of(name).arguments) if is_list(argument)]

    def run(*given: Any) -> Any:
        arguments = list(given)
        for i in lists:
            if arguments[i] is None:  # so AOTInductor passes an empty list
                arguments[i] = []
        return compute(operator, direction, arguments)

    def fake(*arguments: Any) -> Any:
        results = allocate(*arguments[:-1])
        return results if direction == "forward" else _needed(results)

    ALLOCATORS[operator, direction] = allocate
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ecore_kernels::{name}", fake, lib=library)


def past_names(layers: int) -> list[str]:
    return [f"history[{layer}].{part}" for part in ("query", "key") for layer in range(layers)]
