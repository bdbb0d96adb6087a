"""Triton's interpreter without the work that it repeats or throws away: two thirds of its time, none of its results."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from ecore_kernels import triton_kernels


def quicken() -> None:
    """Let interpreted launches do the same with less Python; a Triton that is built otherwise stays as it is.

    - A kernel's functions replace the members of ``triton.language`` anew at every call of one of them, by what stands
      there already; once a launch suffices.
    - Sums, differences and products of integers are computed again in 64 bits for an assertion, which is only made in
      Triton's debug mode.
    - The table of NumPy's types is built for each value that is made.
    """
    if not triton_kernels.INTERPRETED or triton_kernels.unavailable_reason():
        return
    from triton.runtime import interpreter

    with contextlib.suppress(AttributeError, TypeError):
        _patch_once_a_launch(interpreter)
    with contextlib.suppress(AttributeError, TypeError):
        builder = interpreter.interpreter_builder
        if not builder.options.debug:
            builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    with contextlib.suppress(AttributeError, TypeError):
        interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype, interpreter.tl)


def _remembering(numpy_type: Callable[[Any], Any], tl: Any) -> Callable[[Any], Any]:
    of_scalars = functools.cache(numpy_type)

    def remembered(kind: Any) -> Any:
        if isinstance(kind, tl.block_type):
            kind = kind.element_ty
        has_hash = not isinstance(kind, tl.pointer_type)
        return of_scalars(kind) if has_hash else numpy_type(kind)

    return remembered


def _patch_once_a_launch(interpreter: Any) -> None:
    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = (interpreter.tl, interpreter.tl.core)
    nothing_to_restore = interpreter._LangPatchScope()
    launches: list[set[frozenset[int]]] = []  # of each launch under way, the modules that it has patched

    @functools.cache
    def seen_by(function: FunctionType) -> frozenset[int]:
        """The patched modules that a function's globals name."""
        values = function.__globals__.values()
        return frozenset(id(module) for module in modules if any(value is module for value in values))

    def patch_lang(function: FunctionType) -> Any:
        seen = seen_by(function)
        if launches and seen in launches[-1]:
            return nothing_to_restore
        if launches:
            launches[-1].add(seen)
        return patch(function)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        launches.append(set())
        try:
            return execute(self, *arguments, **options)
        finally:
            launches.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call
