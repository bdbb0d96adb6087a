"""The GPU kernels, in Triton: one folder for each operator, and the table of their launch configurations.

Importing this package does not import Triton: if it is missing, :func:`why_not` says so.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecore_kernels.dtypes import node_type
from ecore_kernels.refusals import no_gradient_to_words, not_inside_torch_func
from ecore_kernels.tracing import constant_result

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True if Triton's interpreter replaces a GPU: it runs the kernels on CPU tensors, for tests."""

OLDEST_TRITON = (3, 3)
OLDEST_TRITON_FOR_FLOAT64 = (3, 5)
OLDEST_ARCHITECTURE = (8, 0)
LARGEST_HEAD = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 256, torch.float64: 128}
"""The largest head size by type: for larger ones a backward's tiles do not fit into the shared memory of an sm_86."""
NARROW_ROW = 512
WIDEST_SPARSE_HEAD = 1024
"""The most elements of a head on a sparse graph: one program has rows of several edges in its registers."""
WIDEST_NORM = 8192
"""The most elements of a row that one program normalises: they stay in its registers."""
DEEPEST = {"graph_attention": (3, 2), "edge_readout": (4, 2)}
"""Most layers of history that an operator takes, for the same reason: with rows of queries of up to that many bytes, as
tiles hold them (heads of 128 in float32), and with wider ones."""


def _spelled(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@functools.cache
def _version() -> tuple[int, ...]:
    import triton  # its distribution has other names too, which have other versions

    return tuple(map(int, triton.__version__.split(".")[:2]))


@constant_result
def _lacks_float64() -> bool:
    return _version() < OLDEST_TRITON_FOR_FLOAT64


@constant_result
def unavailable_reason() -> str:
    """Return the reason why no kernel can run in this installation; empty if they can."""
    return _unavailable_reason()


@functools.cache
def _unavailable_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not INTERPRETED:
        if torch.version.hip:
            return "runs on NVIDIA GPUs only"
        if not torch.cuda.is_available():
            return "runs on CUDA GPUs (on CPU only under TRITON_INTERPRET=1, for tests): none is visible"
    if _version() < OLDEST_TRITON:
        return f"needs Triton {_spelled(OLDEST_TRITON)} or newer, not {_spelled(_version())}"
    return "" if INTERPRETED else _driver_refusal()


def _driver_refusal() -> str:
    """Return the reason why Triton cannot reach the GPU: it first compiles a part of its driver in C."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # a missing compiler, a failing one and the driver raise different types
        return f"cannot start Triton's driver: {' '.join(str(error).split()) or type(error).__name__}"
    return ""


@constant_result
def _device_refusal(index: int) -> str:
    return _asked_device_refusal(index)


@functools.cache
def _asked_device_refusal(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_ARCHITECTURE:
        oldest = "".join(map(str, OLDEST_ARCHITECTURE))
        return f"needs compute capability sm_{oldest} or newer, not sm_{''.join(map(str, capability))}"
    return ""


def too_deep(operator: str, depth: int, head: int, kind: torch.dtype) -> list[str]:
    """The reason against that many layers of history with heads of that type and size; empty if there is none."""
    narrow, wide = DEEPEST[operator]
    widest = NARROW_ROW // kind.itemsize
    if head <= widest:
        return [] if depth <= narrow else [f"takes at most {narrow} layers of history, not {depth}"]
    if depth <= wide:
        return []
    name = str(kind).removeprefix("torch.")
    return [f"takes at most {wide} layers of history with heads of {name} wider than {widest}, not {depth}"]


def why_not(*tensors: Tensor, kind: torch.dtype | None = None) -> list[str]:
    """The reasons why the kernels cannot run on these queries, keys or values [B, K, N, d]; empty if they can.

    Args:
        kind: the type that they are multiplied in.
    """
    reason = unavailable_reason()
    if reason:
        return [reason]
    reasons = []
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        if device.type == "cuda":
            refusal = _device_refusal(torch.cuda.current_device() if device.index is None else device.index)
        elif device.type == "cpu" and INTERPRETED:
            refusal = ""
        else:
            refusal = f"runs on CUDA GPUs, not on {device.type}"
        if refusal:
            reasons.append(refusal)
    if kind is None:
        return reasons
    refused = _type_refusals(kind)
    largest = max(tensor.shape[-1] for tensor in tensors)
    if not refused and largest > LARGEST_HEAD[kind]:
        name = str(kind).removeprefix("torch.")
        refused = [f"takes heads of {name} up to {LARGEST_HEAD[kind]} wide, not {largest}"]
    return reasons + refused


def _type_refusals(kind: torch.dtype) -> list[str]:
    """The reason against a type of arithmetic; empty if there is none."""
    if kind not in LARGEST_HEAD:
        name = str(kind).removeprefix("torch.")
        return [f"takes float16, bfloat16, float32 and float64, not {name}"]
    if kind is torch.bfloat16 and INTERPRETED:
        return ["gets bfloat16 wrong under Triton's interpreter"]
    if kind is torch.float64 and _lacks_float64():
        return [f"needs Triton {_spelled(OLDEST_TRITON_FOR_FLOAT64)} or newer for float64"]
    return []


def _edge_attention(
    query: Any = None,
    key: Any = None,
    value: Any = None,
    edge: Any = None,
    *_: Any,
    bias: Any = None,
    gate: Any = None,
    sender_gate: Any = None,
    edge_bias: Any = None,
    dropout: float = 0.0,
    **__: Any,
) -> list[str]:
    if query is None:
        return why_not()
    nodes = [query, key, value]
    reasons = why_not(*nodes, kind=node_type(nodes, edge, bias, gate, sender_gate))
    return reasons + not_inside_torch_func(edge_bias=edge_bias is not None, dropout=dropout > 0.0)


def _graph_attention(
    query: Any = None, key: Any = None, value: Any = None, graph: Any = None, history: Any = (), **_: Any
) -> list[str]:
    if query is None:
        return why_not()
    past = [x for update in history for x in (update.query, update.key)]
    nodes = [query, key, value, *past]
    kind = node_type(nodes, graph.word_weight, *_weights(graph, history))
    reasons = why_not(*nodes, kind=kind)
    if past:
        reasons += too_deep("graph_attention", len(history), _widest(nodes), kind)
    return reasons + no_gradient_to_words(graph)


def _edge_readout(graph: Any = None, history: Any = (), **_: Any) -> list[str]:
    if graph is None:
        return why_not()
    past = [x for update in history for x in (update.query, update.key)]
    nodes = past or [graph.emotion_weight[:, :1]]
    kind = node_type(nodes, *_weights(graph, history))
    reasons = why_not(graph.emotion_weight[:, :1], *past, kind=kind)
    if past:
        reasons += too_deep("edge_readout", len(history), _widest(past), kind)
    return reasons


def _sparse_attention(
    query: Any = None, key: Any = None, value: Any = None, *_: Any, **of_edges: Any
) -> list[str]:
    if query is None:
        return why_not()
    kind = node_type([query, key, value], *(x for x in of_edges.values() if isinstance(x, Tensor)))
    reasons = why_not(query, key, value) or _type_refusals(kind)
    widest = max(query.shape[-1], value.shape[-1])
    if not reasons and widest > WIDEST_SPARSE_HEAD:
        reasons = [f"takes heads of up to {WIDEST_SPARSE_HEAD}, not {widest}"]
    return reasons


def _linear_cross_entropy(hidden: Any = None, weight: Any = None, *_: Any, **__: Any) -> list[str]:
    if hidden is None:
        return why_not()
    return why_not(hidden, weight) or _type_refusals(torch.promote_types(hidden.dtype, weight.dtype))


def _dropout_add_layer_norm(x: Any = None, residual: Any = None, *_: Any, **__: Any) -> list[str]:
    if x is None:
        return why_not()
    reasons = why_not(x, residual) or _type_refusals(torch.promote_types(x.dtype, residual.dtype))
    if not reasons and x.shape[-1] > WIDEST_NORM:
        reasons = [f"takes rows of up to {WIDEST_NORM}, not {x.shape[-1]}"]
    return reasons


def _weights(graph: Any, history: Any) -> list[Tensor | None]:
    """The tensors besides queries, keys and values that decide the type of products."""
    return [graph.emotion_weight, graph.correlation, *(update.gate for update in history)]


def _widest(nodes: list[Tensor]) -> int:
    return max(tensor.shape[-1] for tensor in nodes)


REFUSALS: dict[str, Callable[..., list[str]]] = {
    "edge_attention": _edge_attention,
    "graph_attention": _graph_attention,
    "edge_readout": _edge_readout,
    "sparse_attention": _sparse_attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "dropout_add_layer_norm": _dropout_add_layer_norm,
}
"""By operator: the reasons against a call with these arguments; without any, against all calls on this machine."""
