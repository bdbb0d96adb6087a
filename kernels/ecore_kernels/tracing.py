"""Support for torch.compile, without its import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Record = TypeVar("_Record", bound=NamedTuple)


def constant_result(function: _Function) -> _Function:
    """Mark ``function`` as ``torch.compiler.assume_constant_result`` does: torch.compile calls it and takes its result.

    That one imports ``torch._dynamo``, a third of the CPU time that the package would take to import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def replaced(record: _Record, **changes: Any) -> _Record:
    """Return ``record._replace(**changes)``, in a spelling that torch 2.7 traces: it stops at ``_replace``."""
    kind = type(record)
    return kind(*[changes[name] if name in changes else getattr(record, name) for name in kind._fields])
