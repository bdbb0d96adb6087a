"""The choice among backends.

A backend has a name and, for each operator, a function that lists the reasons why it cannot run a call; an empty list
means that it can. The functions are in the backend's package. ``ECORE_KERNELS_BACKEND`` (read at import) or
:func:`use_backend` choose one backend for every call.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ecore_kernels import native_kernels, triton_kernels
from ecore_kernels.refusals import shown
from ecore_kernels.tracing import replaced


class _Registered(NamedTuple):
    """An operator's public function, and a check that raises ValueError if arguments do not fit each other."""

    function: Callable[..., Any]
    check: Callable[..., None] | None


_registered: dict[str, _Registered] = {}


def register(operator: str, function: Callable[..., Any], check: Callable[..., None] | None) -> None:
    """Enter an operator, for :func:`explain`."""
    _registered[operator] = _Registered(function, check)


OPERATORS = (
    "edge_attention",
    "graph_attention",
    "edge_readout",
    "otsu",
    "linear_cross_entropy",
    "dropout_add_layer_norm",
    "sparse_attention",
    "quantized_linear",
    "quantized_linear_argmax",
    "varlen_attention",
)


@dataclass(frozen=True)
class Backend:
    """One way to run the operators."""

    name: str
    refusals: Mapping[str, Callable[..., list[str]]]
    """For each operator that it implements: the reasons against running a call with these arguments."""
    by_name_only: bool = False
    """Used only when named: Triton's interpreter is for tests, and slower than the other backends."""

    def why_not(self, operator: str, *args: Any, **kwargs: Any) -> list[str]:
        """The reasons why this backend cannot run ``operator`` on these arguments; empty if it can."""
        if operator not in self.refusals:
            return [f"has no {operator} kernel"]
        reasons = self.refusals[operator](*args, **kwargs)
        # Otsu's split has no derivative to lose.
        if self.name != "reference" and operator != "otsu" and (args or kwargs) and differentiates_forward():
            reasons = [*reasons, "has no forward-mode derivative"]
        return reasons


BACKENDS = {
    backend.name: backend
    for backend in (
        # Fastest first.
        Backend("triton", triton_kernels.REFUSALS, by_name_only=triton_kernels.INTERPRETED),
        Backend("native", native_kernels.REFUSALS),
        Backend("reference", {operator: lambda *_, **__: [] for operator in OPERATORS}),
    )
}


def _check_name(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {shown(name)}")
    return name


_from_environment: str | None = None
if os.environ.get("ECORE_KERNELS_BACKEND"):
    _from_environment = _check_name(os.environ["ECORE_KERNELS_BACKEND"], "ECORE_KERNELS_BACKEND")


class _Named(threading.local):
    """The backend that this thread has named, which torch.compile traces and guards (unlike a context variable's)."""

    def __init__(self) -> None:
        self.backend = _from_environment
        self.before: list[str | None] = []  # what the ``with`` blocks around the current one had named


_thread = _Named()


class use_backend(contextlib.ContextDecorator):
    """Context manager and decorator: operators called inside run on the named backend, or raise if it cannot run them.

    The choice holds for the calling thread. A backward runs on the backend of its forward, whatever is named by then.
    But a *forward* in another thread does not see the choice. One case is recomputation (torch.utils.checkpoint) in a
    backward on a GPU, which autograd runs in a thread of its own. Decorate the recomputed function, or pass
    ``backend=``, or set ``ECORE_KERNELS_BACKEND``, which holds for all threads.

    Args:
        name: "triton", "native" or "reference".

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        self._name = _check_name(name, "use_backend")

    def __enter__(self) -> None:
        _thread.before.append(_thread.backend)
        _thread.backend = self._name

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _thread.backend = _thread.before.pop()


def named() -> str | None:
    """The backend that this thread or the environment names for calls without ``backend=``; None if neither does."""
    return _thread.backend


def differentiates_forward() -> bool:
    """Return True inside forward-mode differentiation (``torch.func.jvp``, ``jacfwd``, ``hessian``, dual tensors)."""
    return forward_ad._current_level >= 0


def settles_every_call() -> bool:
    """Return True if a call must be checked again: torch.func and torch.compile hide what the checks depend on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def situation() -> tuple[Any, ...]:
    """Return the global state that a call depends on: named backend, autocast, gradient mode, forward-mode level."""
    cuda = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (
        _thread.backend, torch.is_autocast_enabled("cpu"), cuda, torch.is_grad_enabled(), forward_ad._current_level
    )  # fmt: skip


def choose(operator: str, backend: str | None, *args: Any, **kwargs: Any) -> str:
    """The backend that runs a call: the named one, or the first that can, fastest first.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot run this call; the message lists every reason.
    """
    name = backend if backend is not None else named()
    if name is None:
        chosen = (b for b in BACKENDS.values() if not b.by_name_only)
        return next(b.name for b in chosen if not b.why_not(operator, *args, **kwargs))
    reasons = BACKENDS[_check_name(name, f"{operator}: backend")].why_not(operator, *args, **kwargs)
    if reasons:
        raise RuntimeError(f"{operator}: backend {name!r} cannot run this call: it {'; it '.join(reasons)}")
    return name


def available_backends() -> tuple[str, ...]:
    """The backends that can run at least one operator on this machine, fastest first."""
    return tuple(b.name for b in BACKENDS.values() if any(not b.why_not(operator) for operator in b.refusals))


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type that autocast asks queries, keys and values to have; None outside autocast.

    On a CPU it is float32: low precision is faster only on a GPU's matrix units.
    """
    # Tensors without data ("meta") have no autocast, and asking for it raises.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.float32 if device.type == "cpu" else torch.get_autocast_dtype(device.type)


def autocast(nodes: Tensor, kind: torch.dtype | None) -> Tensor:
    """``nodes`` in the type that :func:`autocast_type` gave; float64 stays, as with torch's own operators."""
    return nodes if kind is None or nodes.dtype is torch.float64 else nodes.to(kind)


def _cast(nodes: Any) -> Any:
    """Queries, keys or values, or a history of them, in the type that autocast has now; anything else as it is."""
    if isinstance(nodes, Tensor):
        return autocast(nodes, autocast_type(nodes.device))
    if isinstance(nodes, (list, tuple)):
        return [replaced(update, query=_cast(update.query), key=_cast(update.key)) for update in nodes]
    return nodes


def _bound(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name.

    Raises:
        ValueError: the operator does not take them, or one of them is missing.
    """
    function = _registered[operator].function
    try:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ValueError(f"explain: {operator}: {error}, in {inspect.signature(function)}") from None


def explain(operator: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return the backend that runs a call, and the reasons against the others.

    Args:
        operator: an operator of this package or its name.
        *args: the call's arguments; without any, the answer holds for this machine in general.
        **kwargs: those given by name.

    Returns:
        One line for each backend, for reading.

    Raises:
        ValueError: an unknown operator or backend.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", str(operator))
    if name not in OPERATORS:
        raise ValueError(f"explain: expected one of {', '.join(OPERATORS)}, got {name!r}")
    wanted_name = kwargs.pop("backend", None) or named()
    if wanted_name is not None:
        _check_name(wanted_name, "explain: backend")
    arguments = _bound(name, args, kwargs) if args or kwargs else {}
    check = _registered[name].check
    if arguments and check is not None:
        check(**arguments)
    # Autocast casts queries, keys and values, but not edges, gates and the graph.
    arguments = {
        n: _cast(v) if n in ("query", "key", "value", "history") else v for n, v in arguments.items()
    }
    lines, chosen = [], None
    for backend in BACKENDS.values():
        reasons = backend.why_not(name, **arguments)
        wanted = wanted_name == backend.name or (wanted_name is None and not backend.by_name_only)
        if not reasons and chosen is None and wanted:
            chosen = backend.name
            verdict = "runs this call" + (" (named)" if wanted_name else "")
        elif reasons:
            verdict = "; ".join(reasons)
        elif wanted_name is None and backend.by_name_only:
            verdict = "could run it, but only where it is named"
        else:
            before = f"{wanted_name} is named" if wanted_name else f"{chosen} comes first"
            verdict = f"could run it, but {before}"
        lines.append(f"  {backend.name}: {verdict}")
    return "\n".join([f"{name}: {chosen or 'no backend can run this call'}", *lines])
