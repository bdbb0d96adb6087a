"""The CPU kernels, in C++: one file for each operator, which passes addresses to the extension.

Arguments and results are those of ``_results`` and ``_gradients`` in the operator's file, which allocates what is
filled here. All tensors of a call but masks have one type. ``precision`` is for GPUs only: here float32 is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import native
from ecore_kernels.native_kernels import otsu
from ecore_kernels.refusals import no_gradient_to_words, not_inside_torch_func

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Half precision is converted before and after, since a CPU computes in float32."""


def why_not(*tensors: Tensor) -> list[str]:
    """The reasons why the kernels cannot run on these queries, keys or values [B, K, N, d]; empty if they can."""
    if not native.available():
        return [native.unavailable_reason()]
    reasons = []
    for device in dict.fromkeys(tensor.device.type for tensor in tensors):
        if device != "cpu":
            reasons.append(f"runs on CPU, not on {device}")
    kinds = dict.fromkeys(tensor.dtype for tensor in tensors)
    for kind in kinds:
        if kind not in TYPES:
            takes = ", ".join(str(known).removeprefix("torch.") for known in TYPES)
            reasons.append(f"takes {takes}, not {str(kind).removeprefix('torch.')}")
    return reasons


CPU = torch.device("cpu")
"""Given wherever memory is allocated, because torch.set_default_device may name another device."""


@functools.cache
def kernel(name: str, kind: torch.dtype) -> Callable[..., Any]:
    """The extension's function of that name for that type."""
    return getattr(native._native, f"{name}_{str(kind).removeprefix('torch.')}")


def readable(tensor: Any) -> Any:
    """``tensor`` as the kernels read it: itself, or a copy if it has another layout in memory; None stays None.

    In a tensor [B, K, N, d] the elements of a row lie side by side; any other tensor is contiguous.
    """
    if tensor is None or (tensor.dim() == 4 and (tensor.stride(3) == 1 or tensor.shape[3] == 1)):
        return tensor
    return tensor.contiguous()


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the address of each tensor's elements; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def number(value: Any, kind: torch.dtype) -> Tensor | None:
    """An edge scale as a tensor of type ``kind``; None stays None."""
    return value if value is None or isinstance(value, Tensor) else _as_tensor(float(value), kind)


@functools.lru_cache(maxsize=64)
def _as_tensor(value: float, kind: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=kind, device=CPU)


def lies_ready(
    tensors: Sequence[Tensor | None], gates: Sequence[Tensor | None], edge_scales: Sequence[Any]
) -> bool:
    """Return True if the extension takes all without a copy; the first need the layout of :func:`readable`."""
    kind = next(x.dtype for x in tensors if x is not None and x.is_floating_point())
    return (
        all(readable(x) is x for x in tensors)
        and all(x is None or (x.dtype is kind and x.is_contiguous()) for x in gates)
        and all(x.dtype is kind and x.is_cpu for x in edge_scales if isinstance(x, Tensor))
    )


def repeatable(
    run: Callable[..., None], results: Sequence[Tensor | None]
) -> Callable[..., tuple[Tensor, ...]]:
    """Make a forward that is bound to a layout repeatable, for calls without a backward.

    Args:
        run: the extension's function: (addresses of tensors, of gates and edge scales, scale, addresses of results,
            threads).
        results: tensors like those of every call; None for those that are not wanted. The first is wanted.

    Returns:
        (tensors, gates, edge_scales, scale) -> the wanted results.
    """
    places = [i for i, x in enumerate(results) if x is not None]
    wanted = [x for x in results if x is not None]
    kind, layouts = wanted[0].dtype, [(x.shape, x.stride()) for x in wanted]
    nowhere = [0] * len(results)

    def call(
        tensors: Sequence[Tensor | None],
        gates: Sequence[Tensor | None],
        edge_scales: Sequence[Any],
        scale: float,
    ) -> tuple[Tensor, ...]:
        made = tuple(torch.empty_strided(shape, stride, dtype=kind, device=CPU) for shape, stride in layouts)
        factors = addresses([*gates, *[number(x, kind) for x in edge_scales]]) if gates else []
        to = nowhere.copy()
        for place, result in zip(places, made, strict=True):
            to[place] = result.data_ptr()
        run(addresses(tensors), factors, scale, to, torch.get_num_threads())
        return made

    if len(layouts) > 1:
        return call
    (shape, stride) = layouts[0]
    nowhere = nowhere[1:]

    def call_for_one(
        tensors: Sequence[Tensor | None],
        gates: Sequence[Tensor | None],
        edge_scales: Sequence[Any],
        scale: float,
    ) -> tuple[Tensor, ...]:  # a call mostly has one result, and a loop would make it 4 % slower
        made = torch.empty_strided(shape, stride, dtype=kind, device=CPU)
        factors = addresses([*gates, *[number(x, kind) for x in edge_scales]]) if gates else []
        run(addresses(tensors), factors, scale, [made.data_ptr(), *nowhere], torch.get_num_threads())
        return (made,)

    return call_for_one


def strides(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """A [B, K, N, d] of any address, as the extension takes it: 0, strides over B, K and N; zeros for None."""
    if tensor is None:
        return 0, 0, 0, 0
    batch, head, row, _ = tensor.stride()
    return 0, batch, head, row


def heads(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """A [B, K, N, d] as the extension takes it: address, strides over B, K and N; 0 for None."""
    if tensor is None:
        return 0, 0, 0, 0
    batch, head, row, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, row


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor's elements; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check_sizes(operator: str, word_mask: Tensor, emotions: int) -> None:
    """Raise ValueError if a registered operator was called directly with a graph that EmotionGraph would refuse.

    The kernels rely on the first word, ``[CLS]``: without it they would read beyond their arguments.
    """
    if min(*word_mask.shape[1:], emotions) < 1:
        raise ValueError(
            f"{operator}: expected at least one resolution, one word ([CLS]) and one emotion, got word_mask "
            f"{list(word_mask.shape)} and {emotions} emotions"
        )


def graph_sizes(word_mask: Tensor, correlation: Tensor) -> tuple[int, ...]:
    """A graph of contiguous tensors of any address, as the extension takes it."""
    emotions = correlation.shape[-1]
    return *word_mask.shape, emotions, 0, 0, 0, 0, 0, 0 if correlation.dim() == 2 else emotions * emotions


def graph_arguments(
    word_mask: Tensor, emotion_mask: Tensor | None, correlation: Tensor, emotion_weight: Tensor | None = None
) -> tuple[int, ...]:
    """A graph of contiguous tensors as the extension takes it in a backward."""
    batch, resolutions, words, emotions, *_, correlation_stride = graph_sizes(word_mask, correlation)
    return (
        batch, resolutions, words, emotions, address(word_mask), address(emotion_mask), 0,
        address(emotion_weight), address(correlation), correlation_stride,
    )  # fmt: skip


def _edge_attention(
    query: Any = None,
    key: Any = None,
    value: Any = None,
    *_: Any,
    edge_bias: Any = None,
    dropout: float = 0.0,
    **__: Any,
) -> list[str]:
    if query is None:
        return why_not()
    return why_not(query, key, value) + not_inside_torch_func(
        edge_bias=edge_bias is not None, dropout=dropout > 0.0
    )


def _graph_attention(
    query: Any = None, key: Any = None, value: Any = None, graph: Any = None, history: Any = (), **_: Any
) -> list[str]:
    past = [x for update in history for x in (update.query, update.key)]
    reasons = why_not(*(() if query is None else (query, key, value, *past)))
    return reasons + no_gradient_to_words(graph)


def _edge_readout(graph: Any = None, history: Any = (), **_: Any) -> list[str]:
    past = [x for update in history for x in (update.query, update.key)]
    return why_not(*(() if graph is None else (past or [graph.emotion_weight])))


def _otsu(values: Tensor | None = None, *_: Any, **__: Any) -> list[str]:
    if values is None:
        return [] if native.available() else [native.unavailable_reason()]
    reason = otsu.why_not(values)
    return [] if reason is None else [reason]


def _linear_cross_entropy(hidden: Tensor | None = None, weight: Any = None, *_: Any, **__: Any) -> list[str]:
    return why_not(*(() if hidden is None else (hidden, weight)))


def _dropout_add_layer_norm(x: Tensor | None = None, residual: Any = None, *_: Any, **__: Any) -> list[str]:
    return why_not(*(() if x is None else (x, residual)))


def _varlen_attention(query: Any = None, key: Any = None, value: Any = None, *_: Any, **__: Any) -> list[str]:
    return why_not(*(x for x in (query, key, value) if x is not None))


def _quantized_linear(x: Tensor | None = None, *_: Any, **__: Any) -> list[str]:
    if x is None:
        return why_not()
    if x.dtype is torch.float64:
        return [*why_not(x), "takes float16, bfloat16, float32, not float64"]
    return why_not(x)


REFUSALS: dict[str, Callable[..., list[str]]] = {
    "edge_attention": _edge_attention,
    "graph_attention": _graph_attention,
    "edge_readout": _edge_readout,
    "otsu": _otsu,
    "sparse_attention": _edge_attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "dropout_add_layer_norm": _dropout_add_layer_norm,
    "quantized_linear": _quantized_linear,
    "quantized_linear_argmax": _quantized_linear,
    "varlen_attention": _varlen_attention,
}
"""By operator: the reasons against a call with these arguments; without any, against all calls on this machine."""
