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
    - Every value works out anew what follows from its shape, and every tuple of sizes its type, which nobody asks for.
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
    with contextlib.suppress(AttributeError, TypeError):
        _derive_once_a_shape(interpreter.tl.core)
    with contextlib.suppress(AttributeError, TypeError):
        _type_tuples_when_asked(interpreter.tl.core)


def _remembering(numpy_type: Callable[[Any], Any], tl: Any) -> Callable[[Any], Any]:
    of_scalars = functools.cache(numpy_type)

    def remembered(kind: Any) -> Any:
        if isinstance(kind, tl.block_type):
            kind = kind.element_ty
        has_hash = not isinstance(kind, tl.pointer_type)
        return of_scalars(kind) if has_hash else numpy_type(kind)

    return remembered


def _derive_once_a_shape(core: Any) -> None:
    """Block types of one element and shape, and tensors of one shape, share what their constructors work out."""
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__

    @functools.cache
    def of_type(element: Any, shape: tuple[int, ...]) -> dict[str, Any]:
        block = object.__new__(core.block_type)
        make_type(block, element, list(shape))
        return vars(block)

    @functools.cache
    def of_shape(shape: tuple[int, ...]) -> dict[str, Any]:
        value = object.__new__(core.tensor)
        make_tensor(value, None, core.block_type(core.int8, list(shape)) if shape else core.int8)
        return vars(value)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        if isinstance(element_ty, core.pointer_type):  # has no hash
            return make_type(self, element_ty, shape)
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        vars(self).update(of_type(element_ty, sizes))

    def tensor(self: Any, handle: Any, type: Any) -> None:
        vars(self).update(of_shape(tuple(type.shape) if type.is_block() else ()))
        self.handle, self.type, self.dtype = handle, type, type.scalar

    of_type(core.int8, (1,))  # an error here, where Triton is built otherwise, leaves it as it is
    of_shape((1,))
    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def _type_tuples_when_asked(core: Any) -> None:
    make = core.tuple.__init__

    def tuple_of(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            make(self, args, type)

    def get(self: Any) -> Any:
        if "kept" not in vars(self):
            make(self, self.values)
        return vars(self)["kept"]

    def keep(self: Any, type: Any) -> None:
        vars(self)["kept"] = type

    core.tuple.__init__, core.tuple.type = tuple_of, property(get, keep)


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
