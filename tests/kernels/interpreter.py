"""Triton's interpreter without the work that it repeats or throws away: most of its time, none of its results."""

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
    - Operands of one type and shape are looked through for what to convert and to broadcast; each call of a member and
      each operand is unwrapped several times, nearly always from nothing.
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
    with contextlib.suppress(AttributeError, TypeError):
        _unwrap_what_is_wrapped(interpreter)
    with contextlib.suppress(AttributeError, TypeError):
        _leave_equal_operands(interpreter)


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
        sizes = tuple([size if isinstance(size, int) else getattr(size, "value", size) for size in shape])
        self.__dict__.update(of_type(element_ty, sizes))

    def tensor(self: Any, handle: Any, type: Any) -> None:
        mine = self.__dict__
        mine.update(of_shape(tuple(type.shape) if type.is_block() else ()))
        mine["handle"], mine["type"], mine["dtype"] = handle, type, type.scalar

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


def _unwrap_what_is_wrapped(interpreter: Any) -> None:
    """Constants, calls of the language's members, and the check that an array's items are no larger than their type."""
    core, handle = interpreter.tl.core, interpreter.TensorHandle
    unwrap, patch, check = core._unwrap_if_constexpr, interpreter._patch_attr, handle.__post_init__
    bare = {core.tensor, core.dtype, core.block_type, int, float, bool, str, type(None)}
    semantic = interpreter.interpreter_semantic

    asks_for_semantic = core.builtin(unwrap).__code__

    def unwrapped(given: Any) -> Any:
        kind = type(given)
        if kind in bare:
            return given
        return given.value if kind is core.constexpr else unwrap(given)

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if getattr(member, "__code__", None) is not asks_for_semantic:
            return patch(owner, name, member, builder, scope)
        inner = member.__wrapped__

        def call(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return inner(*arguments, **options)

        scope.set_attr(owner, name, call)

    def post_init(self: Any) -> None:
        kind = self.dtype
        if type(kind) is not core.dtype or self.data.itemsize * 8 > kind.primitive_bitwidth:
            check(self)

    core._unwrap_if_constexpr, interpreter._patch_attr, handle.__post_init__ = (
        unwrapped,
        patch_attr,
        post_init,
    )


def _leave_equal_operands(interpreter: Any) -> None:
    core, semantic = interpreter.tl.core, type(interpreter.interpreter_semantic)
    convert, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value

    @functools.cache
    def joint(shape: tuple[int, ...], other: tuple[int, ...]) -> list[int] | None:
        """The shape that two broadcast to; None where the interpreter has to say what is wrong, or adds dimensions."""
        if len(shape) != len(other) or any(
            n != m and 1 not in (n, m) for n, m in zip(shape, other, strict=True)
        ):
            return None
        return [m if n == 1 else n for n, m in zip(shape, other, strict=True)]

    def broadcast_value(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        one, other = left.type, right.type
        if not (one.is_block() and other.is_block()):
            return broadcast(self, left, right)
        shape, shape_of_other = one.shape.values, other.shape.values
        if shape == shape_of_other:
            return left, right
        wanted = joint(tuple(shape), tuple(shape_of_other))
        if wanted is None:
            return broadcast(self, left, right)
        if shape != wanted:
            handle = self.builder.create_broadcast(left.handle, wanted)
            left = core.tensor(handle, core.block_type(one.scalar, wanted))
        if shape_of_other != wanted:
            handle = self.builder.create_broadcast(right.handle, wanted)
            right = core.tensor(handle, core.block_type(other.scalar, wanted))
        return left, right

    def convert_operands(self: Any, left: Any, right: Any, *options: Any, **more: Any) -> tuple[Any, Any]:
        # Halves are divided in float32, and pointers may not be added.
        if type(left) is core.tensor and type(right) is core.tensor and len(options) < 4 and not more:
            kind = left.dtype
            if kind is right.dtype and type(kind) is core.dtype:
                return broadcast_value(self, left, right)
        return convert(self, left, right, *options, **more)

    assert core.block_type(core.int8, [2]).shape.values == [2]
    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = convert_operands, broadcast_value


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
