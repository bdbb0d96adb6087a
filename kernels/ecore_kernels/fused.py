"""The operators on fused kernels: one registered operator a direction, and the autograd function around the two.

The ``autograd.Function`` stands outside the registered operators, so that autograd, ``torch.func.grad``,
``torch.compile`` and ``opcheck`` all see plain operators without derivatives of their own. Its tensors come flat and
none of them twice: tensors in a list would get no gradient, and torch.compile fails on a repeated one.

A backend's package has a module an operator with the functions ``forward`` and ``backward``, which take the registered
operators' arguments (without ``backend``).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ecore_kernels.graph import EmotionGraph
from ecore_kernels.layout import empty_rows

_PACKAGES = {"triton": "ecore_kernels.triton_kernels", "native": "ecore_kernels.native_kernels"}

_library = torch.library.Library("ecore_kernels", "FRAGMENT")


@functools.cache
def _kernels(backend: str, operator: str) -> ModuleType:
    """The module of a backend's kernels, imported when first needed: Triton is optional and slow to import."""
    return importlib.import_module(f"{_PACKAGES[backend]}.{operator}")


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question; it guards on its answer
def _matmul_precision() -> str:
    """How float32 matrices are to be multiplied on a GPU: as torch multiplies them."""
    # Since torch 2.9 this knows both ways to ask for tf32; ``get_float32_matmul_precision`` raises after the newer one.
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if chosen is None:
        chosen = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if chosen == "tf32" else "ieee"


@torch.compiler.assume_constant_result
def _inside_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()


def node_type(nodes: list[Tensor], *weights: Tensor | None) -> torch.dtype:
    """The type that queries, keys and values are multiplied in: their common one, float64 where a weight is."""
    kind = functools.reduce(torch.promote_types, (tensor.dtype for tensor in nodes))
    return torch.float64 if any(w is not None and w.dtype is torch.float64 for w in weights) else kind


def _weight_type(kind: torch.dtype) -> torch.dtype:
    """The type of edge weights, row factors and sums beside nodes of type ``kind``."""
    return torch.float64 if kind is torch.float64 else torch.float32


def _apply(function: type[torch.autograd.Function], setting: tuple[Any, ...], *tensors: Tensor | None) -> Any:
    """``function.apply`` where something wants a gradient, else its forward alone.

    Not only cheaper: without gradients torch.compile hands a context to a forward that takes any number of tensors.

    Raises:
        ValueError: tensors on more than one device: the kernels would take an address for one of their own.
        NotImplementedError: tangents of forward-mode differentiation, or torch.func inside of compiled code, where
            nothing seems to require a gradient: derivatives would be lost without a word.
    """
    if torch.compiler.is_compiling():
        if _inside_torch_func():
            raise NotImplementedError(
                f"no torch.func inside of compiled code for fused kernels; {_REFERENCE}"
            )
    else:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(f"no forward-mode derivative in fused kernels; {_REFERENCE}")
    devices = [tensor.device for tensor in tensors if tensor is not None]
    for device in devices:
        if device != devices[0]:
            raise ValueError(f"expected all tensors on one device, got {devices[0]} and {device}")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return function.apply(setting, *tensors)
    return function.forward(setting, *tensors)


_REFERENCE = "backend='reference' has it"


class _Once(torch.autograd.Function):
    """A backward operator, where somebody may want to differentiate it: that raises, where silence would give zeros."""

    @staticmethod
    def forward(operator, sizes, *values):
        # Of the operator's arguments, lists come spread out: tensors in a list are not followed.
        left = iter(values)
        arguments = [next(left) if size is None else [next(left) for _ in range(size)] for size in sizes]
        return tuple(operator(*arguments))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"no second derivative in fused kernels; {_REFERENCE}")


def _differentiated_once(operator: Callable[..., list[Tensor]], *arguments: Any) -> Sequence[Tensor]:
    """``operator(*arguments)``, a backward whose results cannot be differentiated again."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*arguments)
    sizes = tuple(len(a) if isinstance(a, list) else None for a in arguments)
    values = [x for a in arguments for x in (a if isinstance(a, list) else [a])]
    return _Once.apply(operator, sizes, *values)


def _apart(tensors: list[Tensor], kind: torch.dtype) -> list[Tensor]:
    """The tensors in type ``kind``, none of them the same object as another."""
    result: list[Tensor] = []
    for tensor in tensors:
        if tensor.dtype is not kind:
            tensor = tensor.to(kind)
        result.append(tensor.view_as(tensor) if any(tensor is other for other in result) else tensor)
    return result


def _with_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Class decorator: ``apply`` asks for the signature of ``forward`` at every call, and finding it takes its time."""
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


def _register(name: str, operator: str, direction: str, fake: Callable[..., Any]) -> None:
    """Implement a registered operator by a backend's function of that direction."""

    def run(*arguments: Any) -> Any:
        *arguments, backend = arguments
        return getattr(_kernels(backend, operator), direction)(*arguments)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ecore_kernels::{name}", fake, lib=_library)


# graph_attention --------------------------------------------------------------------------------------------

_library.define(
    "fused_graph_attention(Tensor query, Tensor key, Tensor value, Tensor word_weight, Tensor word_mask, "
    "Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, "
    "Tensor? row_factor, float scale, bool words_only, str precision, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "fused_graph_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor word_mask, "
    "Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, Tensor? row_factor, "
    "Tensor output, Tensor log_normalizer, Tensor order, Tensor weight, Tensor counts, float scale, bool words_only, "
    "bool needs_emotion_weight, bool needs_correlation, str precision, str backend) -> Tensor[]"
)


def _graph_attention_fake(query, key, value, word_weight, word_mask, emotion_weight, *rest):
    words_only = rest[-3]
    batch, resolutions, words = word_mask.shape
    nodes = query.shape[2]
    number = _weight_type(query.dtype)
    return (
        empty_rows(value, words if words_only else nodes, value.shape[3], value.dtype),
        query.new_empty((batch, resolutions, nodes), dtype=number),
        query.new_empty((batch, resolutions, nodes), dtype=torch.int32),
        query.new_empty((batch, resolutions, nodes), dtype=number),
        query.new_empty((batch, resolutions, 2), dtype=torch.int32),
    )


def _graph_attention_backward_fake(
    grad_output, query, key, value, word_mask, correlation, emotion_mask, history_query, history_key, row_factor,
    output, log_normalizer, order, weight, counts, scale, words_only, needs_emotion_weight, needs_correlation,
    precision, backend,
):  # fmt: skip
    nodes = query.shape[2]
    gradients = [empty_rows(query, nodes, x.shape[3], x.dtype) for x in (query, key, value)]
    gradients += [empty_rows(query, nodes, x.shape[3], x.dtype) for x in (*history_query, *history_key)]
    if row_factor is not None:
        gradients.append(torch.empty_like(log_normalizer))
    if needs_emotion_weight:
        shape = (word_mask.shape[0], nodes - word_mask.shape[2])
        gradients.append(log_normalizer.new_empty(shape))
    if needs_correlation:
        gradients.append(log_normalizer.new_empty(correlation.shape))
    return gradients


_register("fused_graph_attention", "graph_attention", "forward", _graph_attention_fake)
_register("fused_graph_attention_backward", "graph_attention", "backward", _graph_attention_backward_fake)


@_with_signature
class _GraphAttention(torch.autograd.Function):
    @staticmethod
    def forward(setting, query, key, value, *rest):
        layers, scale, words_only, precision, backend = setting
        *graph, row_factor = rest[:6]
        past = list(rest[6:])
        return torch.ops.ecore_kernels.fused_graph_attention(
            query,
            key,
            value,
            *graph,
            past[:layers],
            past[layers:],
            row_factor,
            scale,
            words_only,
            precision,
            backend,
        )

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.setting = inputs[0]
        ctx.set_materialize_grads(False)  # else zeros are made for outputs that have no gradient
        ctx.save_for_backward(*inputs[1:], *outputs)
        ctx.mark_non_differentiable(*outputs[1:])

    @staticmethod
    def backward(ctx, grad_output, *_):
        layers, scale, words_only, precision, backend = ctx.setting
        query, key, value, _, word_mask, _, correlation, emotion_mask, row_factor, *rest = ctx.saved_tensors
        past, saved = rest[: 2 * layers], rest[2 * layers :]
        if grad_output is None:
            grad_output = torch.zeros_like(saved[0])
        needs_emotion_weight, needs_correlation = ctx.needs_input_grad[6:8]
        gradients = _differentiated_once(
            torch.ops.ecore_kernels.fused_graph_attention_backward,
            grad_output, query, key, value, word_mask, correlation, emotion_mask, past[:layers], past[layers:],
            row_factor, *saved, scale, words_only, needs_emotion_weight, needs_correlation, precision, backend,
        )  # fmt: skip
        nodes, past = gradients[:3], gradients[3 : 3 + 2 * layers]
        weights = iter(gradients[3 + 2 * layers :])
        grad_factor = None if row_factor is None else next(weights)
        grad_emotion_weight = next(weights) if needs_emotion_weight else None
        grad_correlation = next(weights) if needs_correlation else None
        return (None, *nodes, None, None, grad_emotion_weight, grad_correlation, None, grad_factor, *past)


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
    number = _weight_type(kind)
    query, key, value, *past = _apart(nodes, kind)
    output, *_ = _apply(
        _GraphAttention,
        (len(history_query), scale, words_only, _matmul_precision(), backend),
        query,
        key,
        value,
        graph.word_weight.detach().to(number),
        graph.word_mask,
        graph.emotion_weight.to(number),
        graph.correlation.to(number),
        graph.emotion_mask,
        None if row_factor is None else row_factor.to(number),
        *past,
    )
    return output


# edge_readout -----------------------------------------------------------------------------------------------

_library.define(
    "fused_edge_readout(Tensor word_mask, Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, "
    "Tensor[] history_query, Tensor[] history_key, Tensor? row_factor, float scale, bool per_word, str precision, "
    "str backend) -> (Tensor, Tensor)"
)
_library.define(
    "fused_edge_readout_backward(Tensor grad_word_to_emotion, Tensor grad_emotion_to_emotion, Tensor word_mask, "
    "Tensor emotion_weight, Tensor correlation, Tensor? emotion_mask, Tensor[] history_query, Tensor[] history_key, "
    "Tensor? row_factor, float scale, bool per_word, bool needs_emotion_weight, bool needs_correlation, "
    "str precision, str backend) -> Tensor[]"
)


def _edge_readout_fake(word_mask, emotion_weight, *rest):
    per_word = rest[-3]
    batch, _, words = word_mask.shape
    emotions = emotion_weight.shape[1]
    shape = (batch, words, emotions) if per_word else (batch, emotions)
    return emotion_weight.new_empty(shape), emotion_weight.new_empty((batch, emotions, emotions))


def _edge_readout_backward_fake(
    grad_word_to_emotion, grad_emotion_to_emotion, word_mask, emotion_weight, correlation, emotion_mask,
    history_query, history_key, row_factor, scale, per_word, needs_emotion_weight, needs_correlation, precision,
    backend,
):  # fmt: skip
    past = (*history_query, *history_key)
    gradients = [empty_rows(past[0], x.shape[2], x.shape[3], x.dtype) for x in past]
    if row_factor is not None:
        gradients.append(row_factor.new_empty(row_factor.shape))
    if needs_emotion_weight:
        gradients.append(emotion_weight.new_empty(emotion_weight.shape))
    if needs_correlation:
        gradients.append(correlation.new_empty(correlation.shape))
    return gradients


_register("fused_edge_readout", "edge_readout", "forward", _edge_readout_fake)
_register("fused_edge_readout_backward", "edge_readout", "backward", _edge_readout_backward_fake)


@_with_signature
class _EdgeReadout(torch.autograd.Function):
    @staticmethod
    def forward(setting, *tensors):
        layers, scale, per_word, precision, backend = setting
        *graph, row_factor = tensors[:5]
        past = list(tensors[5:])
        return torch.ops.ecore_kernels.fused_edge_readout(
            *graph, past[:layers], past[layers:], row_factor, scale, per_word, precision, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.setting = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *grad_outputs):
        layers, scale, per_word, precision, backend = ctx.setting
        *graph, row_factor = ctx.saved_tensors[:5]
        past = list(ctx.saved_tensors[5:])
        needs_emotion_weight, needs_correlation = ctx.needs_input_grad[2:4]
        gradients = _differentiated_once(
            torch.ops.ecore_kernels.fused_edge_readout_backward,
            *grad_outputs, *graph, past[:layers], past[layers:], row_factor, scale, per_word,
            needs_emotion_weight, needs_correlation, precision, backend,
        )  # fmt: skip
        past, weights = gradients[: 2 * layers], iter(gradients[2 * layers :])
        grad_factor = None if row_factor is None else next(weights)
        grad_emotion_weight = next(weights) if needs_emotion_weight else None
        grad_correlation = next(weights) if needs_correlation else None
        return (None, None, grad_emotion_weight, grad_correlation, None, grad_factor, *past)


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
    weights = graph.emotion_weight, graph.correlation, row_factor
    past = [*history_query, *history_key]
    kind = node_type(past or [graph.emotion_weight], *weights)
    number = _weight_type(kind)
    return _apply(
        _EdgeReadout,
        (len(history_query), scale, per_word, _matmul_precision(), backend),
        graph.word_mask,
        graph.emotion_weight.to(number),
        graph.correlation.to(number),
        graph.emotion_mask,
        None if row_factor is None else row_factor.to(number),
        *_apart(past, kind),
    )


# edge_attention ---------------------------------------------------------------------------------------------

_library.define(
    "fused_edge_attention(Tensor query, Tensor key, Tensor value, Tensor edge, Tensor? neighbors, Tensor? factor, "
    "float scale, str precision, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "fused_edge_attention_backward(Tensor grad_output, Tensor? grad_new_edge, Tensor query, Tensor key, Tensor value, "
    "Tensor edge, Tensor? neighbors, Tensor? factor, Tensor output, Tensor log_normalizer, float scale, "
    "bool needs_edge, str precision, str backend) -> Tensor[]"
)


def _edge_attention_fake(query, key, value, edge, neighbors, factor, scale, precision, backend):
    batch, resolutions, nodes = query.shape[:3]
    number = _weight_type(query.dtype)
    new_edge = (0,) if factor is None else (batch, resolutions, nodes, nodes)
    return (
        empty_rows(value, nodes, value.shape[3], value.dtype),
        query.new_empty(new_edge, dtype=number),
        query.new_empty((batch, resolutions, nodes), dtype=number),
    )


def _edge_attention_backward_fake(
    grad_output, grad_new_edge, query, key, value, edge, neighbors, factor, output, log_normalizer, scale,
    needs_edge, precision, backend,
):  # fmt: skip
    nodes = query.shape[2]
    gradients = [empty_rows(query, nodes, x.shape[3], x.dtype) for x in (query, key, value)]
    if needs_edge:
        gradients.append(edge.new_empty(edge.shape))
    if factor is not None:
        gradients.append(torch.empty_like(log_normalizer))
    return gradients


_register("fused_edge_attention", "edge_attention", "forward", _edge_attention_fake)
_register("fused_edge_attention_backward", "edge_attention", "backward", _edge_attention_backward_fake)


@_with_signature
class _EdgeAttention(torch.autograd.Function):
    @staticmethod
    def forward(setting, *tensors):
        return torch.ops.ecore_kernels.fused_edge_attention(*tensors, *setting)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.setting = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], outputs[0], outputs[2])
        ctx.mark_non_differentiable(outputs[2])

    @staticmethod
    def backward(ctx, grad_output, grad_new_edge, _):
        scale, precision, backend = ctx.setting
        query, key, value, edge, neighbors, factor, output, log_normalizer = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        needs_edge = ctx.needs_input_grad[4]
        gradients = _differentiated_once(
            torch.ops.ecore_kernels.fused_edge_attention_backward,
            grad_output, grad_new_edge if factor is not None else None, query, key, value, edge, neighbors, factor,
            output, log_normalizer, scale, needs_edge, precision, backend,
        )  # fmt: skip
        weights = iter(gradients[3:])
        grad_edge = next(weights) if needs_edge else None
        grad_factor = None if factor is None else next(weights)
        return (None, *gradients[:3], grad_edge, None, grad_factor)


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
    kind = node_type(nodes, edge, factor)
    number = _weight_type(kind)
    output, new_edge, _ = _apply(
        _EdgeAttention,
        (scale, _matmul_precision(), backend),
        *_apart(nodes, kind),
        edge.to(number),
        neighbors,
        None if factor is None else factor.to(number),
    )
    return output, new_edge
