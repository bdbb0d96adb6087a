"""Marks for torch.compile, without its import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_result(function: _Function) -> _Function:
    """Mark ``function`` as ``torch.compiler.assume_constant_result`` does: torch.compile calls it and takes its result.

    That one imports ``torch._dynamo``, a third of the CPU time that the package would take to import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
