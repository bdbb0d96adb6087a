"""Random calls of varlen_attention: draws, the call, and its scores on all pairs of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecore_kernels import Sequences, varlen_attention

if TYPE_CHECKING:
    from tests.fuzz.cases import Case, _Draw

WIDTHS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 129)
LENGTHS = (0, 1, 2, 5, 6, 7, 11, 12, 13, 31, 33, 71, 72, 73)
LONG = (145, 255, 257, 319, 320, 321, 330, 513, 700)


def draw(drawn: _Draw, case: Case) -> None:
    """Draw a call: no sequence or several, empty ones, one of several tiles; rows side by side or not."""
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    case.kind = drawn.any.choices(kinds, [55, 30, 10, 5])[0]
    count = drawn.any.choices([0, 1, 2, 4, 7], [3, 30, 27, 25, 15])[0]
    lengths = [drawn.size(LENGTHS, 80) for _ in range(count)]
    heads, dim = drawn.any.choice([1, 2, 3, 4]), drawn.size(WIDTHS, 130)
    form = drawn.any.choice(["three side by side", "keys and values side by side", "three tensors"])
    value_dim = drawn.size(WIDTHS, 130) if form == "three tensors" else dim
    of_itself = form == "three side by side" or drawn.chance(0.5)
    key_lengths = lengths if of_itself else [drawn.size(LENGTHS, 80) for _ in range(count)]
    if count and drawn.chance(0.15):
        heads, dim, value_dim = 1, min(dim, 33), min(value_dim, dim if form != "three tensors" else 33)
        value_dim = dim if form != "three tensors" else value_dim
        place = drawn.any.randrange(count)
        lengths[place] = drawn.size(LONG, 700)  # and of its keys, where those are the same
        if not of_itself and drawn.chance(0.5):
            key_lengths[place] = drawn.size(LONG, 700)
    case.options["causal"] = of_itself and drawn.chance(0.5)
    scale = drawn.any.choice([dim**-0.5, 1.0, 0.3, -0.7, 2, 0.0 if drawn.chance(0.2) else 1e-3])
    spread = drawn.any.choice([0.1, 1.0, 1.0] if case.kind is torch.float16 else [0.1, 1.0, 1.0, 3.0, 10.0])
    case.options["scale"] = None if drawn.chance(0.1) else scale
    width = (spread / (max(abs(scale), 0.01) * dim**0.5)) ** 0.5

    rows, keys = sum(lengths), sum(key_lengths)
    query, key = (width * drawn.normal(n, heads, dim) for n in (rows, keys))
    value = drawn.normal(keys, heads, value_dim)
    if form == "three side by side":
        given = {"query": torch.stack([query, key, value], 1)}
    elif form == "keys and values side by side":
        given = {"query": query, "key": torch.stack([key, value], 1)}
    else:
        given = {"query": query, "key": key, "value": value}
    for name, values in given.items():
        case.tensors[name] = drawn.placed(values, case.kind)
    if drawn.chance(0.1) and form == "three tensors" and of_itself:
        case.tensors["key"] = case.tensors["query"]
    case.tensors["lengths"] = torch.tensor(lengths, dtype=torch.int64)
    if not of_itself:
        case.tensors["key_lengths"] = torch.tensor(key_lengths, dtype=torch.int64)
    case.upstream = [drawn.placed(drawn.normal(rows, heads, value_dim), case.kind)]
    share = drawn.any.choice([1.0, 1.0, 1.0, 0.5, 0.2, 0.0])
    case.wanted = tuple(name for name in given if drawn.chance(share))


def call(case: Case, tensors: dict[str, Any], backend: str) -> Tensor:
    """The output of the public operator."""
    query = tensors["query"]
    lengths, key_lengths = tensors["lengths"], tensors.get("key_lengths")
    sequences = Sequences.from_lengths(lengths.to(query.device))
    of_keys = None if key_lengths is None else Sequences.from_lengths(key_lengths.to(query.device))
    nodes = query, tensors.get("key"), tensors.get("value")
    return varlen_attention(*nodes, sequences, of_keys, **case.options, backend=backend)


def logits_and_values(case: Case, tensors: dict[str, Any], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [H, R, S] of every row and key, which keys a row hears [R, S], and values [H, S, dv]."""
    query, key, value = (tensors.get(name) for name in ("query", "key", "value"))
    if key is None:
        query, key, value = query.unbind(1)
    elif value is None:
        key, value = key.unbind(1)
    lengths = tensors["lengths"]
    of_keys = tensors.get("key_lengths", lengths)
    owner, key_owner = (torch.arange(len(n)).repeat_interleave(n) for n in (lengths, of_keys))
    hears = owner[:, None] == key_owner
    if case.options["causal"]:
        hears = hears.tril()
    return scale * torch.einsum("ihd,jhd->hij", query, key), hears, value.transpose(0, 1)
