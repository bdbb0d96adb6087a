"""Support for torch.compile without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Record = TypeVar("_Record", bound=NamedTuple)


def constant_result(function: _Function) -> _Function:
    """Mark ``function`` as ``torch.compiler.assume_constant_result`` does: torch.compile calls it and takes its result.

    Torch's own function imports ``torch._dynamo``, which would be a third of the CPU time of importing this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def replaced(record: _Record, **changes: Any) -> _Record:
    """Return ``record._replace(**changes)``, written so that torch 2.7 can trace it: it stops at ``_replace``."""
    kind = type(record)
    return kind(*[changes[name] if name in changes else getattr(record, name) for name in kind._fields])
