"""Plans: the results of a call's checks, kept for calls of the same signature; and the scale of scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecore_kernels import backends
from ecore_kernels.dtypes import kernel_type, node_type, weight_type
from ecore_kernels.operators import registration
from ecore_kernels.operators.checks import check_graph, check_number, check_scalar, check_updates

MOST_SIGNATURES = 4096
"""Signatures remembered for each operator. Without a limit, sizes that never repeat would fill the memory."""


def signature(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return what the checks of a call depend on: all of a tensor but its numbers, the class of other values."""
    try:
        return tuple(
            [
                None  # first, since most of an operator's tensors are
                if x is None
                else (x.__class__, x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_neg())
                if isinstance(x, Tensor)
                else x.__class__
                for x in values
            ]
        )
    except RuntimeError:  # a tensor without strides
        return tuple(
            [
                (x.__class__, x.layout)
                if isinstance(x, Tensor) and x.layout is not torch.strided
                else signature([x])
                for x in values
            ]
        )


class Plan(NamedTuple):
    """Result of a call's checks, shared by all calls of the same signature."""

    backend: str
    autocast: torch.dtype | None
    """Type that autocast gives queries, keys and values; None outside of autocast."""
    result: torch.dtype
    """Type of the output."""
    as_they_are: bool
    """True if the backend's kernels take the tensors without conversion and no gradient is wanted."""
    bound: Callable[..., Any] | None = None
    """(tensors, gates, edge_scales, scale) -> results: the forward for tensors in this layout, if there is one."""


def settled(plans: dict[Any, Plan], tensors: Sequence[Any], options: Any, make: Callable[[], Plan]) -> Plan:
    """The plan of a call: that of the last call with the same signature, or a new one.

    Raises:
        ValueError, RuntimeError: the call is refused.
    """
    if backends.settles_every_call():
        return make()
    call = (signature(tensors), options, backends.situation())
    try:
        plan = plans.get(call)
    except TypeError:  # an option that cannot be hashed, which its check names
        return make()
    if plan is None:
        plan = make()
        if len(plans) >= MOST_SIGNATURES:
            plans.clear()
        plans[call] = plan
    return plan


def runs_at_once(plan: Plan) -> bool:
    """Return True if a call can bypass autograd and torch's dispatcher: it wants no gradients, and nothing sees it."""
    return plan.as_they_are and not registration.is_observed()


def takes_as_they_are(
    backend: str,
    nodes: Sequence[Tensor],
    weights: Sequence[Any],
    masks: Sequence[Any],
    scales: Sequence[Any],
) -> bool:
    """Return True if a backend's kernels take queries, keys and values, edges and gates, and masks as they are.

    False if one of them, or an edge scale, requires a gradient.
    """
    if backend == "reference" or backends.settles_every_call():
        return False
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*nodes, *weights, *scales)
    ):
        return False
    weights, masks = ([x for x in of if x is not None] for of in (weights, masks))
    kind = kernel_type(node_type(nodes, *weights), backend)
    return (
        all(registration.is_plain(x) for x in (*nodes, *weights, *masks))
        and not any(isinstance(x, Tensor) and x.is_neg() for x in scales)
        and all(x.dtype is kind for x in nodes)
        and all(x.dtype is weight_type(kind) for x in weights)
    )


def bound_forward(
    operator: str,
    backend: str,
    arguments: Sequence[Any],
    gates: Sequence[Tensor | None],
    edge_scales: Sequence[Any],
) -> Callable[..., Any] | None:
    """A backend's forward for tensors in the layout of these, and gates and edge scales like these; see :class:`Plan`.

    Args:
        arguments: those of the registered operator without ``backend``; the row factor is not read.

    Returns:
        None if the backend has no such function, or has to copy a tensor first.
    """
    module = registration.kernels(backend, operator)
    if not hasattr(module, "bind"):
        return None
    return module.bind(
        arguments, registration.ALLOCATORS[operator, "forward"](*arguments), gates, edge_scales
    )


def flat(operator: str, nodes: Sequence[Any], graph: Any, history: Any) -> list[Any]:
    """The tensors of a call: ``nodes``, five of the graph, and four of each layer of history.

    Raises:
        ValueError: ``graph`` is no graph, or ``history`` no history.
    """
    check_graph(operator, graph)
    check_updates(operator, history)
    tensors = [*nodes, *graph.tensors()]
    for update in history:
        tensors.extend(update)  # not +=: torch 2.11 traces that as list + list, and refuses a named tuple
    return tensors


def score_scale(
    operator: str, scale: Any, dim: int, queries: Sequence[Tensor]
) -> tuple[float, Sequence[Tensor]]:
    """The factor on the scores as a number, and the queries that it leaves.

    A scale in a tensor is multiplied into the queries instead. So autograd gives its gradient, and no value is fetched
    from a GPU. The same is done with a number that torch.compile has found to vary: as an argument of an operator it
    would cause a recompilation for every value.

    Args:
        scale: a number, a tensor of one number, or None for 1 / sqrt(dim).
    """
    if scale is None:
        return max(dim, 1) ** -0.5, queries
    if isinstance(scale, Tensor):
        check_scalar(operator, "scale", scale)
        one = scale.reshape(())
        return 1.0, [(query * one).to(query.dtype) for query in queries]
    check_number(operator, "scale", scale)
    if torch.compiler.is_compiling() and not has_static_value(scale):
        return 1.0, [query * scale for query in queries]
    return scale, queries


def has_static_value(number: Any) -> bool:
    """Return True if ``number`` is a constant also where torch traces."""
    if isinstance(number, (int, float)) and not torch.compiler.is_compiling():
        return True
    # Not imported above: it brings SymPy, a sixth of what importing this package takes. Who traces has imported it.
    shapes = torch.fx.experimental.symbolic_shapes
    # torch before 2.8 has no such function: it recompiles for every number.
    return not hasattr(shapes, "has_static_value") or shapes.has_static_value(number)


def without_autocast(
    device: torch.device, kind: torch.dtype | None
) -> contextlib.AbstractContextManager[None]:
    """A context without autocast for an operator's arithmetic; ``kind`` is from :func:`backends.autocast_type`."""
    return contextlib.nullcontext() if kind is None else torch.autocast(device.type, enabled=False)
