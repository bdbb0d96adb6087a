"""Random calls of sparse_attention: draws, the call, and its scores on all pairs of a receiver and an edge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecore_kernels import EdgeList, sparse_attention

if TYPE_CHECKING:
    from tests.fuzz.cases import Case, _Draw

OF_EDGES = ("edge", "bias", "key_scale", "key_offset", "value_offset")
EDGES = (0, 1, 2, 7, 16, 17, 33, 64, 200)
WIDTHS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 129)


def draw(drawn: _Draw, case: Case) -> None:
    """Draw a call: degrees from none to hundreds, edges that are there twice, tensors of any shape that broadcasts."""
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    case.kind = drawn.any.choices(kinds, [55, 30, 10, 5])[0]
    wide = case.kind is torch.float64
    weights = torch.float64 if wide == drawn.chance(0.9) else torch.float32  # mostly as the nodes
    heads, dim, value_dim = drawn.any.choice([1, 2, 3, 4]), drawn.size(WIDTHS, 130), drawn.size(WIDTHS, 130)
    receivers, senders = drawn.any.randint(1, 50), drawn.any.randint(1, 50)
    if drawn.chance(0.3):
        senders = receivers
    count = drawn.size(EDGES, 300)
    index = torch.stack([(drawn.uniform(count) * nodes).long() for nodes in (senders, receivers)])
    for row in range(2):  # nodes with many edges, and so others with none
        if drawn.chance(0.3):
            index[row, drawn.uniform(count) < 0.5] = 0
    kind = drawn.any.choice([torch.int64, torch.int32])
    placed = drawn.placed(index, kind)  # of which some values may be shared: then senders may be no receivers
    in_range = bool((placed.cpu() < torch.tensor([[senders], [receivers]])).all())
    case.tensors["edge_index"] = placed if in_range else index.to(drawn.device, kind)
    scale = drawn.any.choice([dim**-0.5, 1.0, 0.3, -0.7, 2, 0.0 if drawn.chance(0.2) else 1e-3])
    spread = drawn.any.choice([0.1, 1.0, 1.0] if case.kind is torch.float16 else [0.1, 1.0, 1.0, 3.0, 10.0])
    case.options["scale"] = None if drawn.chance(0.1) else scale
    width = (spread / (max(abs(scale), 0.01) * dim**0.5)) ** 0.5

    def place(name: str, values: Tensor, kind: torch.dtype) -> None:
        case.tensors[name] = drawn.placed(values, kind)

    place("query", width * drawn.normal(receivers, heads, dim), case.kind)
    place("key", width * drawn.normal(senders, heads, dim), case.kind)
    place("value", drawn.normal(senders, heads, value_dim), case.kind)
    if drawn.chance(0.1) and senders == receivers:
        case.tensors["key"] = case.tensors["query"]
    for name in OF_EDGES[:2]:
        if drawn.chance(0.5):
            shape = drawn.any.choice(
                [(count, heads), (count, heads), (count,), (count, 1), (1, heads), (1, 1)]
            )
            place(name, drawn.normal(*shape), weights)
    for name in OF_EDGES[2:]:
        if drawn.chance(0.4):
            whole = (count, heads, value_dim if name == "value_offset" else dim)
            shape = drawn.any.choice([whole, whole, (count, 1, whole[2]), (heads, 1), (whole[2],), ()])
            place(name, drawn.normal(*shape), drawn.any.choice([weights, case.kind]))
    if drawn.chance(0.3) and dim == value_dim and "key_offset" in case.tensors:
        case.tensors["value_offset"] = case.tensors["key_offset"]
    case.upstream = [drawn.placed(drawn.normal(receivers, heads, value_dim), case.kind)]
    floats = [name for name in case.tensors if name != "edge_index"]
    share = drawn.any.choice([1.0, 1.0, 1.0, 0.5, 0.2, 0.0])
    case.wanted = tuple(name for name in floats if drawn.chance(share))


def call(case: Case, tensors: dict[str, Any], backend: str) -> Tensor:
    """The output of the public operator."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    edges = EdgeList.from_edge_index(tensors["edge_index"], (key.shape[0], query.shape[0]))
    given = {name: tensors.get(name) for name in OF_EDGES}
    return sparse_attention(query, key, value, edges, **given, **case.options, backend=backend)


def broadcast(case: Case) -> set[str]:
    """Those tensors of edges whose gradient PyTorch sums up, in an order that depends on the threads."""
    heads, count = case.tensors["query"].shape[1], case.tensors["edge_index"].shape[1]
    found = set()
    for name in OF_EDGES:
        width = {"edge": (), "bias": (), "value_offset": case.tensors["value"].shape[2:]}
        full = (count, heads, *width.get(name, case.tensors["query"].shape[2:]))
        if name in case.tensors and case.tensors[name].shape != full:
            found.add(name)
    return found


def logits_and_values(tensors: dict[str, Any], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [H, N, E] of every receiver and edge, who hears which edge [N, E], and values [H, E, dv]."""
    sender, receiver = tensors["edge_index"].long()
    query, key, value = tensors["query"][receiver], tensors["key"][sender], tensors["value"][sender]
    heads, count = query.shape[1], len(sender)
    one, zero = query.new_ones(1, 1), query.new_zeros(1, 1)
    factor, bias = (
        x[:, None] if x.dim() == 1 else x for x in (tensors.get("edge", one), tensors.get("bias", zero))
    )
    key = key * tensors.get("key_scale", 1.0) + tensors.get("key_offset", 0.0)  # [E, H, d]
    value = value + tensors.get("value_offset", 0.0)
    score = scale * (query * key).sum(-1) * factor + bias  # [E, H]
    hears = torch.arange(tensors["query"].shape[0])[:, None] == receiver
    return score.T[:, None].expand(heads, len(hears), count), hears, value.transpose(0, 1)
