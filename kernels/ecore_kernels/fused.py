"""The operators on fused kernels: one registered operator a direction, and the autograd functions around the two.

The ``autograd.Function`` stands outside the registered operators, so that autograd, ``torch.func``, ``torch.compile``
and ``opcheck`` all see plain operators without derivatives of their own. Its tensors come flat, those that may need a
gradient first, and none of them twice: tensors in a list would get no gradient, and torch.compile fails on a repeated
one.

A backend's package has a module an operator with the functions ``forward`` and ``backward``, which take the registered
operators' arguments (without ``backend``).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecore_kernels import reference
from ecore_kernels.checks import check_saveable
from ecore_kernels.graph import EmotionGraph
from ecore_kernels.layout import empty_rows, empty_saved

_PACKAGES = {"triton": "ecore_kernels.triton_kernels", "native": "ecore_kernels.native_kernels"}
_HALF = (torch.float16, torch.bfloat16)

library = torch.library.Library("ecore_kernels", "FRAGMENT")


@functools.cache
def kernels(backend: str, operator: str) -> ModuleType:
    """The module of a backend's kernels, imported when first needed: Triton is optional and slow to import."""
    return importlib.import_module(f"{_PACKAGES[backend]}.{operator}")


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question
def _matmul_precision() -> str:
    """How float32 matrices are to be multiplied on a GPU: as torch multiplies them."""
    # Since torch 2.9 this knows both ways to ask for tf32; ``get_float32_matmul_precision`` raises after the newer one.
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if chosen is None:
        chosen = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if chosen == "tf32" else "ieee"


def precision(backend: str) -> str:
    return "ieee" if backend == "native" else _matmul_precision()


@torch.compiler.assume_constant_result
def _inside_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()


def node_type(nodes: Sequence[Tensor], *weights: Tensor | None) -> torch.dtype:
    """The type that queries, keys and values are multiplied in: their common one, float64 where a weight is."""
    kind = nodes[0].dtype
    for tensor in nodes:
        if tensor.dtype is not kind:
            kind = torch.promote_types(kind, tensor.dtype)
    return torch.float64 if any(w is not None and w.dtype is torch.float64 for w in weights) else kind


def kernel_type(kind: torch.dtype, backend: str) -> torch.dtype:
    """The type that a backend's kernels take nodes in: a CPU has no units for half precision."""
    return torch.float32 if backend == "native" and kind in _HALF else kind


def weight_type(kind: torch.dtype) -> torch.dtype:
    """The type of edge weights, row factors and sums beside nodes of type ``kind``."""
    return torch.float64 if kind is torch.float64 else torch.float32


class _Operator(NamedTuple):
    """One fused operator, as functions of its setting and its flat tensors."""

    forward: Callable[..., tuple[Tensor, ...]]
    """(setting, tensors) -> results."""
    backward: Callable[..., list[Tensor]]
    """(setting, needs, gradients of results, tensors, kept results) -> gradients of those that need one."""
    reference: Callable[..., tuple[Tensor, ...]]
    """(setting, tensors) -> the results that have gradients, in plain PyTorch."""
    differentiable: int
    """How many of the results have gradients; the others are for the backward alone."""
    kept: tuple[int, ...]
    """The results that the backward wants."""
    names: Callable[[Any], list[str]]
    """(first of the setting) -> the flat tensors' names, for messages."""


_operators: dict[str, _Operator] = {}


def _with_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Class decorator: ``apply`` asks for the signature of ``forward`` at every call, and finding it takes its time."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


@_with_signature
class _Fused(torch.autograd.Function):
    """An operator's two kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, setting, *tensors):
        return _operators[name].forward(setting, tensors)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        name, setting, *tensors = inputs
        ctx.name, ctx.setting, ctx.inputs = name, setting, len(tensors)
        operator = _operators[name]
        ctx.set_materialize_grads(False)  # else zeros are made for outputs that have no gradient
        ctx.save_for_backward(*tensors, *(outputs[i] for i in operator.kept))
        ctx.mark_non_differentiable(*outputs[operator.differentiable :])

    @staticmethod
    def backward(ctx, *gradients):
        operator = _operators[ctx.name]
        gradients = gradients[: operator.differentiable]
        needs = ctx.needs_input_grad[2:]
        nothing = (None,) * (2 + len(needs))
        if all(g is None for g in gradients) or not any(needs):
            return nothing
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _FusedBackward.apply(ctx.name, ctx.setting, needs, ctx.inputs, *gradients, *saved)
        else:
            tensors, kept = saved[: ctx.inputs], saved[ctx.inputs :]
            found = operator.backward(ctx.setting, needs, gradients, tensors, kept)
        found = iter(found)
        return (None, None, *(next(found) if needed else None for needed in needs))


@_with_signature
class _FusedBackward(torch.autograd.Function):
    """An operator's backward kernel where it may be differentiated again: by the reference, at the same inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, setting, needs, inputs, *tensors):
        operator = _operators[name]
        gradients, tensors = tensors[: operator.differentiable], tensors[operator.differentiable :]
        return tuple(operator.backward(setting, needs, gradients, tensors[:inputs], tensors[inputs:]))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.name, ctx.setting, ctx.needs, count, *tensors = inputs
        ctx.save_for_backward(*tensors[: _operators[ctx.name].differentiable + count])

    @staticmethod
    def backward(ctx, *gradients):
        operator, tensors = _operators[ctx.name], ctx.saved_tensors
        results = operator.differentiable
        given = [i for i in range(results) if tensors[i] is not None]
        asked = [i + results for i, needed in enumerate(ctx.needs) if needed]
        # What the gradients depend on: the results' gradients, and every input of floats.
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


def _apply(name: str, setting: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The operator's results, by ``_Fused.apply`` where something wants a gradient, else by its forward alone.

    Not only cheaper: without gradients torch.compile hands a context to a forward that takes any number of tensors.

    Raises:
        ValueError: an inference tensor, which cannot be saved for the backward.
        NotImplementedError: torch.func inside of compiled code, where nothing seems to require a gradient: derivatives
            would be lost without a word.
    """
    if torch.compiler.is_compiling():
        if _inside_torch_func():
            raise NotImplementedError(
                "no torch.func inside of compiled code for fused kernels; backend='reference' has it"
            )
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return _Fused.apply(name, setting, *tensors)
        return _operators[name].forward(setting, tensors)
    if torch._C._are_functorch_transforms_active():  # whose tensors hide what requires a gradient
        return _Fused.apply(name, setting, *tensors)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                try:
                    return _Fused.apply(name, setting, *tensors)
                except RuntimeError:
                    check_saveable(
                        name, **dict(zip(_operators[name].names(setting[0]), tensors, strict=True))
                    )
                    raise
    return _operators[name].forward(setting, tensors)


def _apart(tensors: Sequence[Tensor], kind: torch.dtype) -> list[Tensor]:
    """The tensors in type ``kind``; for torch.compile none of them the same object as another."""
    result = [x if x.dtype is kind else x.to(kind) for x in tensors]
    if torch.compiler.is_compiling():
        for i, tensor in enumerate(result):
            if any(tensor is other for other in result[:i]):
                result[i] = tensor.view_as(tensor)
    return result


def _as(tensor: Tensor, kind: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is kind else tensor.to(kind)


PLAIN = (Tensor, torch.nn.Parameter)


def dispatches(tensors: Sequence[Tensor | None]) -> bool:
    """Return True if a call on these must pass torch's dispatcher, where somebody may listen.

    The dispatcher takes longer than a small call's kernels. It has nothing to do for plain tensors outside of
    torch.compile, torch.func, dispatch modes (FakeTensorMode, FlopCounterMode, ...) and profilers.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
        or any(x is not None and type(x) not in PLAIN for x in tensors)
    )


def _run(operator: str, direction: str, tensors: Sequence[Tensor | None], arguments: tuple[Any, ...]) -> Any:
    """Run a backend's kernels, through torch's dispatcher where it :func:`dispatches`.

    Args:
        tensors: those of the call.
        arguments: those of the registered operator, the backend's name last.
    """
    if dispatches(tensors):
        name = f"fused_{operator}" if direction == "forward" else f"fused_{operator}_backward"
        return getattr(torch.ops.ecore_kernels, name)(*arguments)
    *arguments, backend = arguments
    return getattr(kernels(backend, operator), direction)(*arguments)


def _arguments(name: str) -> list[Any]:
    """The arguments of a registered operator."""
    return getattr(torch.ops.ecore_kernels, name).default._schema.arguments


def _register(name: str, operator: str, direction: str, fake: Callable[..., Any]) -> None:
    """Implement a registered operator by a backend's function of that direction."""

    def run(*arguments: Any) -> Any:
        *arguments, backend = arguments
        for i in lists:
            if arguments[i] is None:  # so AOTInductor passes an empty list
                arguments[i] = []
        return getattr(kernels(backend, operator), direction)(*arguments)

    lists = [i for i, of in enumerate(_arguments(name)) if str(of.type) == "List[Tensor]"]
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ecore_kernels::{name}", fake, lib=library)


# graph_attention --------------------------------------------------------------------------------------------

library.define(
    "fused_graph_attention(Tensor query, Tensor key, Tensor value, Tensor word_weight, Tensor word_mask, "
    "Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, "
    "Tensor? row_factor, float scale, bool words_only, str precision, str backend) -> (Tensor, Tensor)"
)
library.define(
    "fused_graph_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor word_mask, "
    "Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, Tensor? row_factor, "
    "Tensor output, Tensor saved, float scale, bool words_only, bool[] needs, str precision, str backend) -> Tensor[]"
)


def _graph_attention_fake(query, key, value, word_weight, word_mask, emotion_weight, *rest):
    words_only = rest[-3]
    rows = word_mask.shape[2] if words_only else query.shape[2]
    return empty_rows(value, rows, value.shape[3], value.dtype), empty_saved(query, 5)


def _graph_attention_backward_fake(
    grad_output, query, key, value, word_mask, correlation, emotion_mask, history_query, history_key, row_factor,
    output, saved, scale, words_only, needs, precision, backend,
):  # fmt: skip
    nodes = (query, key, value, *history_query, *history_key)
    count = query.shape[2]
    gradients = [
        empty_rows(query, count, x.shape[3], x.dtype)
        for x, needed in zip(nodes, needs, strict=False)
        if needed
    ]
    shapes = (query.shape[:3], (query.shape[0], count - word_mask.shape[2]), correlation.shape)
    gradients += [saved.new_empty(shape) for shape, needed in zip(shapes, needs[-3:], strict=True) if needed]
    return gradients


_register("fused_graph_attention", "graph_attention", "forward", _graph_attention_fake)
_register("fused_graph_attention_backward", "graph_attention", "backward", _graph_attention_backward_fake)

# Of all three operators: setting = (layers of history, ..., precision, backend).


def _past_names(layers: int) -> list[str]:
    return [f"history[{layer}].{part}" for part in ("query", "key") for layer in range(layers)]


class _GraphTensors(NamedTuple):
    """The flat tensors of graph_attention: queries, keys and values, then the rest."""

    query: Tensor
    key: Tensor
    value: Tensor
    history_query: list[Tensor]
    history_key: list[Tensor]
    row_factor: Tensor | None
    emotion_weight: Tensor
    correlation: Tensor
    word_weight: Tensor
    word_mask: Tensor
    emotion_mask: Tensor | None

    @classmethod
    def of(cls, layers: int, tensors: Sequence[Any]) -> _GraphTensors:
        past = list(tensors[3 : 3 + 2 * layers])
        return cls(*tensors[:3], past[:layers], past[layers:], *tensors[3 + 2 * layers :])


def _graph_attention_forward(setting, tensors):
    layers, scale, words_only, precision, backend = setting
    of = _GraphTensors.of(layers, tensors)
    arguments = (
        of.query, of.key, of.value, of.word_weight, of.word_mask, of.emotion_weight, of.correlation, of.emotion_mask,
        of.history_query, of.history_key, of.row_factor, scale, words_only, precision, backend,
    )  # fmt: skip
    return _run("graph_attention", "forward", tensors, arguments)


def _graph_attention_backward(setting, needs, gradients, tensors, kept):
    layers, scale, words_only, precision, backend = setting
    of = _GraphTensors.of(layers, tensors)
    arguments = (
        gradients[0], of.query, of.key, of.value, of.word_mask, of.correlation, of.emotion_mask, of.history_query,
        of.history_key, of.row_factor, *kept, scale, words_only, list(needs[: 6 + 2 * layers]), precision, backend,
    )  # fmt: skip
    return _run("graph_attention", "backward", (gradients[0], *tensors), arguments)


def _graph_attention_reference(setting, tensors):
    layers, scale, words_only, _, _ = setting
    of = _GraphTensors.of(layers, tensors)
    graph = EmotionGraph(of.word_weight, of.word_mask, of.emotion_weight, of.correlation, of.emotion_mask)
    output = reference.graph_attention(
        of.query, of.key, of.value, graph, of.history_query, of.history_key, of.row_factor, scale, words_only
    )
    return (output,)


_operators["graph_attention"] = _Operator(
    _graph_attention_forward,
    _graph_attention_backward,
    _graph_attention_reference,
    1,
    (0, 1),
    lambda layers: ["query", "key", "value", *_past_names(layers), *_GraphTensors._fields[5:]],
)


def graph_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: EmotionGraph,
    history_query: list[Tensor],
    history_key: list[Tensor],
    row_factor: Tensor | None,
    scale: float,
    words_only: bool,
    backend: str,
) -> Tensor:
    """:func:`ecore_kernels.graph_attention` on a backend's fused kernels; arguments as the reference's.

    Returns:
        [B, K, N or M, dv], in the type that values are multiplied in.
    """
    nodes = [query, key, value, *history_query, *history_key]
    kind = node_type(nodes, graph.word_weight, graph.emotion_weight, graph.correlation, row_factor)
    kind = kernel_type(kind, backend)
    number = weight_type(kind)
    word_weight = graph.word_weight.detach() if graph.word_weight.requires_grad else graph.word_weight
    output, _ = _apply(
        "graph_attention",
        (len(history_query), scale, words_only, precision(backend), backend),
        *_apart(nodes, kind),
        None if row_factor is None else _as(row_factor, number),
        _as(graph.emotion_weight, number),
        _as(graph.correlation, number),
        _as(word_weight, number),
        graph.word_mask,
        graph.emotion_mask,
    )
    return output


# edge_readout -----------------------------------------------------------------------------------------------

library.define(
    "fused_edge_readout(Tensor word_mask, Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, "
    "Tensor[] history_query, Tensor[] history_key, Tensor? row_factor, float scale, bool per_word, str precision, "
    "str backend) -> (Tensor, Tensor)"
)
library.define(
    "fused_edge_readout_backward(Tensor grad_word_to_emotion, Tensor grad_emotion_to_emotion, Tensor word_mask, "
    "Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, "
    "Tensor? row_factor, float scale, bool per_word, bool[] needs, str precision, str backend) -> Tensor[]"
)


def _edge_readout_fake(word_mask, emotion_weight, *rest):
    per_word = rest[-3]
    batch, _, words = word_mask.shape
    emotions = emotion_weight.shape[1]
    shape = (batch, words, emotions) if per_word else (batch, emotions)
    return emotion_weight.new_empty(shape), emotion_weight.new_empty((batch, emotions, emotions))


def _edge_readout_backward_fake(
    grad_word_to_emotion, grad_emotion_to_emotion, word_mask, emotion_weight, correlation, emotion_mask,
    history_query, history_key, row_factor, scale, per_word, needs, precision, backend,
):  # fmt: skip
    past = (*history_query, *history_key)
    gradients = [
        empty_rows(past[0], x.shape[2], x.shape[3], x.dtype)
        for x, needed in zip(past, needs, strict=False)
        if needed
    ]
    rest = (row_factor, emotion_weight, correlation)
    return gradients + [x.new_empty(x.shape) for x, needed in zip(rest, needs[-3:], strict=True) if needed]


_register("fused_edge_readout", "edge_readout", "forward", _edge_readout_fake)
_register("fused_edge_readout_backward", "edge_readout", "backward", _edge_readout_backward_fake)


class _ReadoutTensors(NamedTuple):
    """The flat tensors of edge_readout."""

    history_query: list[Tensor]
    history_key: list[Tensor]
    row_factor: Tensor | None
    emotion_weight: Tensor
    correlation: Tensor
    word_mask: Tensor
    emotion_mask: Tensor | None

    @classmethod
    def of(cls, layers: int, tensors: Sequence[Any]) -> _ReadoutTensors:
        past = list(tensors[: 2 * layers])
        return cls(past[:layers], past[layers:], *tensors[2 * layers :])

    def arguments(self) -> tuple[Any, ...]:
        """The registered operators' arguments from word_mask to row_factor."""
        graph = (self.word_mask, self.emotion_weight, self.correlation, self.emotion_mask)
        return (*graph, self.history_query, self.history_key, self.row_factor)


def _edge_readout_forward(setting, tensors):
    layers, *rest = setting
    of = _ReadoutTensors.of(layers, tensors)
    return _run("edge_readout", "forward", tensors, (*of.arguments(), *rest))


def _edge_readout_backward(setting, needs, gradients, tensors, kept):
    layers, scale, per_word, precision, backend = setting
    of = _ReadoutTensors.of(layers, tensors)
    to_word, to_emotion = gradients
    batch, _, words = of.word_mask.shape
    emotions = of.emotion_weight.shape[1]
    if to_word is None:
        to_word = to_emotion.new_zeros((batch, words, emotions) if per_word else (batch, emotions))
    if to_emotion is None:
        to_emotion = to_word.new_zeros((batch, emotions, emotions))
    arguments = (
        to_word, to_emotion, *of.arguments(), scale, per_word, list(needs[: 3 + 2 * layers]), precision, backend,
    )  # fmt: skip
    return _run("edge_readout", "backward", (*gradients, *tensors), arguments)


def _edge_readout_reference(setting, tensors):
    layers, scale, per_word, _, _ = setting
    of = _ReadoutTensors.of(layers, tensors)
    words = of.emotion_weight.new_zeros((of.word_mask.shape[0], of.word_mask.shape[2]))  # not read
    graph = EmotionGraph(words, of.word_mask, of.emotion_weight, of.correlation, of.emotion_mask)
    return reference.edge_readout(graph, of.history_query, of.history_key, of.row_factor, scale, per_word)


_operators["edge_readout"] = _Operator(
    _edge_readout_forward,
    _edge_readout_backward,
    _edge_readout_reference,
    2,
    (),
    lambda layers: [*_past_names(layers), *_ReadoutTensors._fields[2:]],
)


def edge_readout(
    graph: EmotionGraph,
    history_query: list[Tensor],
    history_key: list[Tensor],
    row_factor: Tensor | None,
    scale: float,
    per_word: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`ecore_kernels.edge_readout` on a backend's fused kernels; arguments as the reference's."""
    past = [*history_query, *history_key]
    kind = node_type(past or [graph.emotion_weight], graph.emotion_weight, graph.correlation, row_factor)
    kind = kernel_type(kind, backend)
    number = weight_type(kind)
    to_word, to_emotion = _apply(
        "edge_readout",
        (len(history_query), scale, per_word, precision(backend), backend),
        *_apart(past, kind),
        None if row_factor is None else _as(row_factor, number),
        _as(graph.emotion_weight, number),
        _as(graph.correlation, number),
        graph.word_mask,
        graph.emotion_mask,
    )
    return to_word, to_emotion


# edge_attention ---------------------------------------------------------------------------------------------

library.define(
    "fused_edge_attention(Tensor query, Tensor key, Tensor value, Tensor edge, Tensor? neighbors, Tensor? factor, "
    "float scale, str precision, str backend) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "fused_edge_attention_backward(Tensor grad_output, Tensor? grad_new_edge, Tensor query, Tensor key, Tensor value, "
    "Tensor edge, Tensor? neighbors, Tensor? factor, Tensor output, Tensor saved, float scale, bool[] needs, "
    "str precision, str backend) -> Tensor[]"
)


def _edge_attention_fake(query, key, value, edge, neighbors, factor, scale, precision, backend):
    batch, resolutions, nodes = query.shape[:3]
    new_edge = (0,) if factor is None else (batch, resolutions, nodes, nodes)
    return (
        empty_rows(value, nodes, value.shape[3], value.dtype),
        query.new_empty(new_edge, dtype=weight_type(query.dtype)),
        empty_saved(query, 2),
    )


def _edge_attention_backward_fake(
    grad_output, grad_new_edge, query, key, value, edge, neighbors, factor, output, saved, scale, needs, precision,
    backend,
):  # fmt: skip
    nodes = (query, key, value)
    gradients = [
        empty_rows(query, query.shape[2], x.shape[3], x.dtype)
        for x, needed in zip(nodes, needs, strict=False)
        if needed
    ]
    if needs[3]:
        gradients.append(edge.new_empty(edge.shape))
    if needs[4]:
        gradients.append(saved.new_empty(query.shape[:3]))
    return gradients


_register("fused_edge_attention", "edge_attention", "forward", _edge_attention_fake)
_register("fused_edge_attention_backward", "edge_attention", "backward", _edge_attention_backward_fake)


def _edge_attention_forward(setting, tensors):
    query, key, value, edge, factor, neighbors = tensors
    arguments = (query, key, value, edge, neighbors, factor, *setting)
    return _run("edge_attention", "forward", tensors, arguments)


def _edge_attention_backward(setting, needs, gradients, tensors, kept):
    scale, precision, backend = setting
    query, key, value, edge, factor, neighbors = tensors
    grad_output, grad_new_edge = gradients
    if grad_output is None:
        grad_output = torch.zeros_like(kept[0])
    arguments = (
        grad_output, None if factor is None else grad_new_edge, query, key, value, edge, neighbors, factor, *kept,
        scale, list(needs[:5]), precision, backend,
    )  # fmt: skip
    return _run("edge_attention", "backward", (*gradients, *tensors), arguments)


def _edge_attention_reference(setting, tensors):
    scale, _, _ = setting
    query, key, value, edge, factor, neighbors = tensors
    one = None if factor is None else factor.new_ones(())
    output, new_edge = reference.edge_attention(query, key, value, edge, neighbors, factor, one, scale)
    return output, output.new_empty(0) if new_edge is None else new_edge


_operators["edge_attention"] = _Operator(
    _edge_attention_forward,
    _edge_attention_backward,
    _edge_attention_reference,
    2,
    (0, 2),
    lambda _: ["query", "key", "value", "edge", "factor", "neighbors"],
)


def edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    factor: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`ecore_kernels.edge_attention` on a backend's fused kernels.

    Args:
        query, key, value: as there.
        edge, neighbors: [1 or B, 1 or K, N, N]; a size of 1 is shared. No neighbors: the graph is complete.
        factor: [B, K, N], gate * edge_scale; None for no new edges.
        scale: factor on the scores.

    Returns:
        output [B, K, N, dv], in the type that values are multiplied in; new_edge [B, K, N, N], empty without
        ``factor``.
    """
    nodes = [query, key, value]
    kind = kernel_type(node_type(nodes, edge, factor), backend)
    number = weight_type(kind)
    output, new_edge, _ = _apply(
        "edge_attention",
        (scale, precision(backend), backend),
        *_apart(nodes, kind),
        _as(edge, number),
        None if factor is None else _as(factor, number),
        neighbors,
    )
    return output, new_edge
