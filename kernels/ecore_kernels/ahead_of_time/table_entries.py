"""Entries: the kernels that the launch table holds for an architecture, and the launch that each describes.

The launchers define the launches: they run on ``meta`` tensors, and plan instead of launching.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecore_kernels.operators.registration import compute
from ecore_kernels.triton_kernels import DEEPEST, NARROW_ROW, launch
from ecore_kernels.triton_kernels.launch import Launch

PAPER_HEAD = 100  # padded to 128: what an entry for heads of 128 is compiled for
PAPER_DEPTH = 1  # layers of history of the paper's last attention
SCARCEST = 86  # has the least shared memory, which decides how deep a history may be
_TYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32, "float64": torch.float64}
_SIZES = {"batch": 2, "resolutions": 3, "words": 128, "emotions": 32}  # vary at run time: any will do


class Entry(NamedTuple):
    """One kernel as an architecture runs it at one head size and depth of history."""

    kernel: str  # as in the launch table: "graph_attention_forward"
    arithmetic: str
    head: int
    depth: int
    architecture: int
    # "shared edge": edges that broadcast over batch and resolutions, with their gradient; "options": all that
    # edge_attention takes beside edges and gates; "words": no others receive; "delta": what runs before a backward in
    # ieee and float64, with its launch configuration
    variant: str = ""

    @property
    def operator(self) -> str:
        return self.kernel.rpartition("_")[0]

    @property
    def direction(self) -> str:
        return self.kernel.rpartition("_")[2]


def entries(architecture: int) -> list[Entry]:
    """All that the launch table holds for an architecture.

    Every entry is listed at its own head size and depth (100 stands for 128). In half and tf32 the paper's head size is
    also listed at up to three layers of history, with the entry that a call of that depth gets; for sm_86 also with
    only words as receivers, and with both head sizes at the greatest depth that is not refused. float64 and ieee are
    listed at their own depths only: they are for checking, and take the longest to compile.
    """
    found: dict[Entry, None] = {}
    for (kernel, arithmetic), rows in launch.table().items():
        operator = kernel.rpartition("_")[0]
        wanted = {(row["head"], row["depth"]) for row in rows if row["architecture"] <= architecture}
        if arithmetic in ("half", "tf32"):
            wanted |= {(128, depth) for depth in range(min(3, _deepest(operator, arithmetic, 128)) + 1)}
            if architecture == SCARCEST:
                wanted |= {(head, _deepest(operator, arithmetic, head)) for head in (128, 256)}
        for head, depth in sorted(wanted):
            if operator == "edge_readout" and arithmetic == "half":
                depth = max(depth, 1)  # without history no tensor has that type
            entry = Entry(kernel, arithmetic, PAPER_HEAD if head == 128 else head, depth, architecture)
            found[entry] = None
            if (
                operator != "edge_readout"
                and entry.direction == "backward"
                and arithmetic in ("ieee", "float64")
            ):
                found[entry._replace(variant="delta")] = None
            if kernel == "edge_attention_backward" and entry.head == PAPER_HEAD:
                found[entry._replace(variant="shared edge")] = None
            if operator == "edge_attention" and entry.head == PAPER_HEAD and architecture == SCARCEST:
                found[entry._replace(variant="options")] = None
            is_the_papers = (operator, entry.head, depth) == ("graph_attention", PAPER_HEAD, PAPER_DEPTH)
            if is_the_papers and architecture == SCARCEST:
                found[entry._replace(variant="words")] = None
    return list(found)


def _deepest(operator: str, arithmetic: str, head: int) -> int:
    """The most layers of history that the operator takes; edge_attention has none."""
    narrow, wide = DEEPEST.get(operator, (0, 0))
    return narrow if head * _TYPES[arithmetic].itemsize <= NARROW_ROW else wide


def _graph_attention(
    entry: Entry, scale: float, rows: Callable[[], Tensor], number: Callable[..., Tensor]
) -> None:
    batch, resolutions, words, emotions = _SIZES.values()
    mask = torch.empty(batch, resolutions, words, dtype=torch.bool, device="meta")
    word_weight, emotion_weight = number(batch, words), number(batch, emotions)
    correlation = number(emotions, emotions)
    history = [rows() for _ in range(entry.depth)], [rows() for _ in range(entry.depth)]
    row_factor = number(batch, resolutions, words + emotions) if entry.depth else None
    query, key, value = rows(), rows(), rows()
    precision, words_only = launch.dot_precision(entry.arithmetic), entry.variant == "words"
    forward = (
        query, key, value, word_weight, mask, emotion_weight, correlation, None, *history, row_factor, scale,
        words_only, precision, "triton",
    )  # fmt: skip
    output, saved = compute("graph_attention", "forward", forward)
    needs = [True] * (3 + 2 * entry.depth) + [entry.depth > 0, True, True]
    backward = (
        output, query, key, value, mask, correlation, None, *history, row_factor, output, saved, scale, words_only,
        needs, precision, "triton",
    )  # fmt: skip
    compute("graph_attention", "backward", backward)


def _edge_readout(
    entry: Entry, scale: float, rows: Callable[[], Tensor], number: Callable[..., Tensor]
) -> None:
    batch, resolutions, words, emotions = _SIZES.values()
    mask = torch.empty(batch, resolutions, words, dtype=torch.bool, device="meta")
    history = [rows() for _ in range(entry.depth)], [rows() for _ in range(entry.depth)]
    row_factor = number(batch, resolutions, words + emotions) if entry.depth else None
    graph = (mask, number(batch, emotions), number(emotions, emotions), None)
    setting = launch.dot_precision(entry.arithmetic), "triton"
    inputs = (*graph, *history, row_factor, scale, False)
    outputs = compute("edge_readout", "forward", (*inputs, *setting))
    needs = [True] * (2 * entry.depth) + [entry.depth > 0, True, True]
    compute("edge_readout", "backward", (*outputs, *inputs, needs, *setting))


def _edge_attention(
    entry: Entry, scale: float, rows: Callable[[], Tensor], number: Callable[..., Tensor]
) -> None:
    batch, resolutions, words, emotions = _SIZES.values()
    nodes = words + emotions
    edge = number(*((1, 1) if entry.variant == "shared edge" else (batch, resolutions)), nodes, nodes)
    neighbors = torch.empty(batch, resolutions, nodes, nodes, dtype=torch.bool, device="meta")
    factor = number(batch, resolutions, nodes)
    inputs: tuple[Tensor | None, ...] = (
        rows(),
        rows(),
        rows(),
        edge,
        neighbors,
        None,
        factor,
        None,
        None,
        None,
    )
    numbers: tuple[Any, ...] = (scale, None, 0.0, False)
    setting = (launch.dot_precision(entry.arithmetic), "triton")
    if entry.variant == "options":
        seed = torch.empty((), dtype=torch.int64, device="meta")
        inputs = *inputs[:5], number(*edge.shape), factor, number(batch, resolutions, nodes), number(), seed
        numbers = scale, (-5.0, 5.0), 0.1, True
    output, new_edge, _, saved = compute("edge_attention", "forward", (*inputs, *numbers, False, *setting))
    grad_lse = number(batch, resolutions, nodes) if entry.variant == "options" else None
    needs = [x is not None for x in (*inputs[:4], *inputs[5:9])]
    compute(
        "edge_attention",
        "backward",
        (output, new_edge, grad_lse, *inputs, output, saved, *numbers, needs, *setting),
    )


_OPERATORS = {
    "graph_attention": _graph_attention,
    "edge_readout": _edge_readout,
    "edge_attention": _edge_attention,
}


def planned(entry: Entry, scale: float = 0.1) -> Launch:
    """The launch that the operator's own launcher makes for this entry, with every gradient wanted."""
    batch, resolutions, words, emotions = _SIZES.values()
    dtype = _TYPES[entry.arithmetic]
    accumulated = torch.float64 if dtype is torch.float64 else torch.float32

    def rows() -> Tensor:  # [B, K, N, d], the heads side by side
        shape = batch, words + emotions, resolutions, entry.head
        return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)

    def number(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=accumulated, device="meta")

    with launch.plan(entry.architecture) as launches:
        _OPERATORS[entry.operator](entry, scale, rows, number)
    if entry.variant == "delta":
        return launches[1]
    return launches[0] if entry.direction == "forward" else launches[-1]
