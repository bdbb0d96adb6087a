"""One random call of an operator: its tensors, where they lie in memory, which of them want gradients."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import EdgeUpdate, EmotionGraph, edge_attention, edge_readout, graph_attention, otsu
from tests.fuzz import sequences, sparse

OPERATORS = (
    "graph_attention", "edge_attention", "edge_readout", "otsu", "sparse_attention", "varlen_attention"
)  # fmt: skip
SHARES = (26, 25, 13, 14, 11, 11)  # of the cases, in percent

# Sizes around the kernels' vectors, panels and tiles; others are drawn too.
WIDTHS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 130)
NODES = (1, 2, 5, 6, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 71, 72, 73, 95, 97)
# Standard deviation of the scores; history multiplies it, so that deep cases get less.
SPREADS = (0.1, 1.0, 1.0, 3.0, 10.0)


@dataclasses.dataclass
class Case:
    """One call.

    Attributes:
        tensors: inputs by name, those of history's layer m with the number m behind; an edge scale may be a number.
            One tensor may stand under several names.
        wanted: the inputs that ask for gradients.
        upstream: gradients of the outputs; None for an output that nothing depends on.
        kind: the type that queries, keys and values are multiplied in.
    """

    seed: int
    index: int
    operator: str
    depth: int = 0
    tensors: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    upstream: list[Tensor | None] = dataclasses.field(default_factory=list)
    kind: torch.dtype = torch.float32
    threads: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{name} {list(x.shape)}"
            for name, x in self.tensors.items()
            if isinstance(x, Tensor) and name[-1] > "9"
        )
        kind = str(self.kind).removeprefix("torch.")
        return f"{self.operator}, {self.depth} layers of history, {kind}, {shapes}, {self.options}"


EDGE_TENSORS = ("edge", "neighbors", "bias", "gate", "edge_scale", "edge_bias", "sender_gate")
"""The inputs of edge_attention beside nodes."""


def mapped(tensors: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The inputs changed, each tensor once, under whatever names it stands."""
    changed = {
        id(x): change(x) for x in {id(x): x for x in tensors.values() if isinstance(x, Tensor)}.values()
    }
    return {name: changed.get(id(x), x) for name, x in tensors.items()}


def graph_of(tensors: dict[str, Any]) -> EmotionGraph:
    """The emotion graph among the inputs."""
    names = ("word_weight", "word_mask", "emotion_weight", "correlation")
    return EmotionGraph(*(tensors[name] for name in names), tensors.get("emotion_mask"))


def history_of(case: Case, tensors: dict[str, Any]) -> list[EdgeUpdate]:
    """The earlier layers among the inputs."""
    names = ("query", "key", "gate", "edge_scale")
    return [EdgeUpdate(*(tensors.get(f"{name}{m}") for name in names)) for m in range(case.depth)]


def call(case: Case, tensors: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    """The outputs of the public operator."""
    if case.operator == "otsu":
        return tuple(otsu(tensors["values"], **case.options, backend=backend))
    if case.operator == "edge_readout":
        return edge_readout(graph_of(tensors), history_of(case, tensors), **case.options, backend=backend)
    if case.operator == "sparse_attention":
        return (sparse.call(case, tensors, backend),)
    if case.operator == "varlen_attention":
        return (sequences.call(case, tensors, backend),)
    nodes = tensors["query"], tensors["key"], tensors["value"]
    if case.operator == "graph_attention":
        history = history_of(case, tensors)
        return (graph_attention(*nodes, graph_of(tensors), history, **case.options, backend=backend),)
    given: dict[str, Any] = {name: tensors.get(name) for name in EDGE_TENSORS}
    outputs = edge_attention(*nodes, **given, **case.options, backend=backend)
    return tuple(x if n < 2 else finite(x) for n, x in enumerate(outputs) if x is not None)


def finite(lse: Tensor) -> Tensor:
    """Logarithms of sums, 0 for receivers without neighbours."""
    return torch.where(lse == float("-inf"), 0.0, lse)


def broadcast(case: Case) -> set[str]:
    """Those of edge and bias whose gradient [Nq, Nk] PyTorch sums up, in an order that depends on the threads."""
    if case.operator == "sparse_attention":
        return sparse.broadcast(case)
    if case.operator != "edge_attention":
        return set()
    full = (case.tensors["query"].shape[2], case.tensors["key"].shape[2])
    return {n for n in ("edge", "bias") if n in case.tensors and case.tensors[n].shape[-2:] != full}


def operator_of(seed: int, index: int) -> str:
    """The operator of a case."""
    return random.Random(f"operator {seed} {index}").choices(OPERATORS, SHARES)[0]


def draw(seed: int, index: int, device: str = "cpu") -> Case:
    """The case of that number. It depends on seed and number alone."""
    drawn = _Draw(seed, index, device)
    case = Case(seed, index, operator_of(seed, index))
    case.threads = drawn.any.choice([(1, 2), (1, 4), (3, 1), (2, 7)])
    if case.operator == "otsu":
        drawn.otsu(case)
    elif case.operator == "sparse_attention":
        sparse.draw(drawn, case)
    elif case.operator == "varlen_attention":
        sequences.draw(drawn, case)
    else:
        drawn.attention(case)
    return case


class _Draw:
    def __init__(self, seed: int, index: int, device: str) -> None:
        self.any = random.Random(f"case {seed} {index}")
        self.generator = torch.Generator().manual_seed(self.any.getrandbits(48))
        self.device = device

    # Numbers

    def chance(self, probability: float) -> bool:
        return self.any.random() < probability

    def size(self, usual: Sequence[int], most: int) -> int:
        """One of the usual sizes or any other, at most that."""
        return min(most, self.any.choice(usual) if self.chance(0.6) else self.any.randint(1, most))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    # Where a tensor lies

    def placed(self, tensor: Tensor, kind: torch.dtype) -> Tensor:
        """The values in type ``kind``, somewhere in memory; some values are then shared.

        Dimensions may lie in another order, with gaps (they hold NaN) and behind an odd offset, or be expanded.
        """
        tensor = tensor.to(kind)
        if self.chance(0.4) or tensor.numel() == 0:
            return tensor.to(self.device)
        shape, dims = tensor.shape, range(tensor.dim())
        if self.chance(0.15) and tensor.dim():
            tensor = tensor.narrow(self.any.choice(dims), 0, 1)
        order = list(dims)
        if self.chance(0.6):
            # Heads side by side, as a projection leaves them, or anything.
            order = (
                [0, 2, 1, 3] if len(order) == 4 and self.chance(0.6) else self.any.sample(order, len(order))
            )
        steps = [self.any.choice([1, 1, 1, 2, 3]) if self.chance(0.3) else 1 for _ in dims]
        more = [self.any.choice([0, 0, 1, 4]) if self.chance(0.3) else 0 for _ in dims]
        lengths = [tensor.shape[d] * steps[d] + more[d] for d in dims]
        offset = self.any.choice([0, 0, 1, 3, 8])
        count = torch.Size([lengths[d] for d in order]).numel()
        gap = float("nan") if kind.is_floating_point else 1
        memory = torch.full((count + offset,), gap, dtype=kind, device=self.device)
        whole = memory[offset:].view([lengths[d] for d in order]).permute([order.index(d) for d in dims])
        for d in dims:
            whole = whole.narrow(d, more[d] // 2, tensor.shape[d] * steps[d])
            whole = whole[(slice(None),) * d + (slice(None, None, steps[d]),)]
        return whole.copy_(tensor).expand(shape)

    # The operators

    def attention(self, case: Case) -> None:
        """Draw a call of an operator on dense graphs."""
        case.depth = 0 if case.operator == "edge_attention" else self.any.choice([0, 1, 1, 2, 3])
        case.kind = self.any.choices(
            [torch.float32, torch.float64, torch.bfloat16, torch.float16], [55, 30, 10, 5]
        )[0]
        wide = case.kind is torch.float64
        weights = torch.float64 if wide == self.chance(0.9) else torch.float32  # mostly as the nodes
        # Two factors in float32 are multiplied in float32, whatever the nodes are.
        factors = case.kind if wide else self.any.choice([weights, weights, case.kind])
        batch = self.any.choices([0, 1, 2, 3], [3, 40, 37, 20])[0]
        resolutions = self.any.choice([1, 2, 3])
        dim, value_dim = self.size(WIDTHS, 130), self.size(WIDTHS, 130)
        large = self.chance(0.08)
        if large:
            batch, resolutions = min(batch, 2), min(resolutions, 2)
            dim, value_dim = min(dim, 40), min(value_dim, 40)
        words = self.any.randint(41, 280) if large else self.size(NODES, 40)
        emotions = self.any.randint(1, 40) if large else self.size(NODES, 12)
        nodes = words + emotions
        if case.operator == "edge_attention":
            nodes = self.any.randint(53, 330) if large else self.size(NODES, 97 if dim < 40 else 52)
        lead = (batch, resolutions, nodes)
        sent_from = lead  # of keys and values
        if case.operator == "edge_attention" and self.chance(0.4):
            senders = self.any.randint(1, 330) if large else self.size(NODES, 97 if dim < 40 else 52)
            kept = self.any.choice([heads for heads in (1, 2, 3) if resolutions % heads == 0])
            sent_from = (batch, kept, self.any.choice([nodes, senders]))

        scale = self.any.choice([dim**-0.5, 1.0, 0.3, -0.7, 2, 0.0 if self.chance(0.2) else 1e-3])
        case.options["scale"] = scale
        if self.chance(0.1):
            case.options["scale"] = None
            scale = dim**-0.5
        spread = self.any.choice(SPREADS[: len(SPREADS) - case.depth])
        if case.kind is torch.float16:
            spread = min(spread, 1.0)
        # Scores are scale times a sum of dim products.
        width = (spread / (max(abs(scale), 0.01) * dim**0.5)) ** 0.5
        tensors = case.tensors

        def place(name: str, values: Tensor, kind: torch.dtype) -> None:
            tensors[name] = self.placed(values, kind)

        def number(name: str) -> None:
            value = self.any.choice([0.7, -1.3, 1.0])
            if self.chance(0.2):
                tensors[name] = value
            else:
                shape = self.any.choice([(), (), (1,)])
                place(name, torch.full(shape, value), self.any.choice([torch.float32, factors]))

        if case.operator != "edge_readout":
            kinds = [case.kind] * 3
            if self.chance(0.04):
                kinds[self.any.randrange(3)] = torch.float32
            place("query", width * self.normal(*lead, dim), kinds[0])
            place("key", width * self.normal(*sent_from, dim), kinds[1])
            place("value", self.normal(*sent_from, value_dim), kinds[2])
            if self.chance(0.05) and sent_from == lead:
                tensors["key"] = tensors["query"]
            if self.chance(0.05):
                tensors["value"] = tensors["key"]
                value_dim = dim
            for x in tensors.values():
                case.kind = torch.promote_types(case.kind, x.dtype)
        for m in range(case.depth):
            place(f"query{m}", width * self.normal(*lead, dim), case.kind)
            place(f"key{m}", width * self.normal(*lead, dim), case.kind)
            if self.chance(0.8):
                place(f"gate{m}", self.normal(*lead), factors)
                number(f"edge_scale{m}")
            if self.chance(0.05):
                tensors[f"query{m}"] = tensors[
                    self.any.choice(["query", "query0"][("query" not in tensors) :])
                ]
        if case.operator == "edge_readout" and not case.depth:
            case.kind = weights

        shapes: list[tuple[int, ...]]
        result = case.kind
        edges = torch.promote_types(torch.promote_types(case.kind, weights), torch.float32)
        if case.operator == "edge_attention":
            full = (*lead, sent_from[2])
            self.dense(case, full, weights, place)
            shapes = [(*lead, value_dim)]
            if self.chance(0.5):
                place("gate", self.normal(*lead), factors)
                number("edge_scale")
                shapes.append(full)
            if self.chance(0.6):
                shapes = self.more(case, full, weights, factors, scale, shapes, place)
        else:
            self.graph(case, (batch, resolutions, words, emotions), weights, place)
            if case.operator == "graph_attention":
                case.options["receivers"] = self.any.choice(["all", "all", "words"])
                rows = words if case.options["receivers"] == "words" else nodes
                shapes = [(batch, resolutions, rows, value_dim)]
            else:
                result = edges
                case.options["per_word"] = self.chance(0.5)
                per_word = (batch, words, emotions) if case.options["per_word"] else (batch, emotions)
                shapes = [per_word, (batch, emotions, emotions)]
        case.upstream = [
            self.placed(self.normal(*shape), edges if position else result)
            for position, shape in enumerate(shapes)
        ]
        if len(shapes) > 1 and self.chance(0.3):
            case.upstream[self.any.randrange(len(shapes))] = None

        floats = [n for n, x in tensors.items() if isinstance(x, Tensor) and x.is_floating_point()]
        if not self.chance(0.02):
            floats = [name for name in floats if name != "word_weight"]
        share = self.any.choice([1.0, 1.0, 1.0, 0.5, 0.2, 0.0])
        case.wanted = tuple(name for name in floats if self.chance(share))
        if share == 0.2 and not case.wanted:
            case.wanted = (self.any.choice(floats),)

    def matrix(self, full: tuple[int, int, int, int]) -> tuple[int, ...]:
        """A shape that broadcasts to [B, H, Nq, Nk]."""
        batch, heads, receivers, senders = full
        shapes = [full, full, (batch, 1, *full[2:]), (1, heads, *full[2:]), full[2:]]
        odd = [(), (senders,), (receivers, 1), (heads, 1, 1), (batch, 1, 1, 1), (1, 1, 1, senders)]
        return self.any.choice(odd if self.chance(0.2) else shapes)

    def more(
        self,
        case: Case,
        full: tuple[int, int, int, int],
        weights: torch.dtype,
        factors: torch.dtype,
        scale: float,
        shapes: list[tuple[int, ...]],
        place: Callable,
    ) -> list[tuple[int, ...]]:
        """Options of edge_attention beside edges and a gate; returns the shapes of its results."""
        tensors, options = case.tensors, case.options
        batch, heads, _, senders = full
        if self.chance(0.4):
            place("bias", self.normal(*self.matrix(full)), weights)
        if self.chance(0.25):
            tensors.pop("edge")
        if self.chance(0.3):
            place("sender_gate", self.normal(batch, heads, senders), factors)
        for name in ("gate", "edge_scale"):
            if self.chance(0.15):
                tensors.pop(name, None)
        if self.chance(0.25):
            place("edge_bias", torch.full((), self.any.choice([0.7, -1.0])), factors)
        if self.chance(0.3):
            options["update"] = "all"
        if self.chance(0.3):
            options |= {"dropout": self.any.choice([0.1, 0.5, 0.9]), "seed": self.any.getrandbits(64)}
        if self.chance(0.3) and batch:
            query, key = tensors["query"].cpu().double(), tensors["key"].cpu().double()
            scores = scale * (query @ key.repeat_interleave(heads // key.shape[1], 1).mT)
            options["clamp"] = tuple(sorted(self.between(scores.flatten().sort().values) for _ in range(2)))
        shapes = shapes[:1]
        if any(name in tensors for name in ("gate", "edge_scale", "edge_bias")):
            shapes.append(full)
        if self.chance(0.3):
            options["return_lse"] = True
            shapes.append(full[:3])
        return shapes

    def between(self, ordered: Tensor) -> float:
        """A number far from all of these: a score that rounding moves past a bound has another gradient."""
        first = self.any.randrange(len(ordered))
        some = ordered[first : first + 40]
        if len(some) < 2:
            return float(ordered[-1]) + 1.0
        wide = int(some.diff().argmax())
        return float(some[wide : wide + 2].mean())

    def dense(
        self, case: Case, full: tuple[int, int, int, int], weights: torch.dtype, place: Callable
    ) -> None:
        """Edges and neighbours of an edge_attention, of any shapes that broadcast."""
        edge = self.normal(*self.matrix(full))
        kind = weights
        if self.chance(0.05):
            kind, edge = self.any.choice([(torch.bool, edge > 0), (torch.int32, edge.round())])
        place("edge", edge, kind)
        if self.chance(0.2):
            return
        shape = self.matrix(full)
        neighbors = self.uniform(*shape) < self.any.choice([0.02, 0.3, 0.7, 0.97, 1.0, 0.0])
        if neighbors.dim() > 1 and self.chance(0.4):
            neighbors &= self.uniform(*shape[:-1], 1) < 0.6  # rows without neighbours
        if neighbors.dim() and self.chance(0.2):
            neighbors &= self.uniform(*(1,) * (len(shape) - 1), shape[-1]) < 0.6  # senders that nobody hears
        place("neighbors", neighbors, torch.bool)

    def graph(
        self, case: Case, size: tuple[int, int, int, int], weights: torch.dtype, place: Callable
    ) -> None:
        """The emotion graph of a call."""
        batch, resolutions, words, emotions = size
        masks = self.uniform(batch, resolutions, words) < self.any.choice([0.05, 0.05, 0.5, 0.9, 1.0, 1.0])
        if self.chance(0.4):  # padding
            masks &= torch.arange(words) < (self.uniform(batch, 1, 1) * (words + 1)).long()
        if self.chance(0.3):  # as thresholds do it: the first resolution has every word
            masks[:, 0] = True
        place("word_weight", self.uniform(batch, words), weights)
        place("word_mask", masks, torch.bool)
        place("emotion_weight", self.normal(batch, emotions), weights)
        lead = (batch, emotions, emotions) if self.chance(0.4) else (emotions, emotions)
        place("correlation", self.normal(*lead).softmax(-1), weights)
        if self.chance(0.5):
            relevant = self.uniform(batch, emotions) < self.any.choice([0.0, 0.5, 0.5, 0.9])
            if self.chance(0.4):
                relevant = torch.arange(emotions).expand(batch, -1) == self.any.randrange(
                    emotions
                )  # one alone
            place("emotion_mask", relevant, torch.bool)

    def otsu(self, case: Case) -> None:
        """Rows with equal values among them."""
        case.kind = self.any.choice(
            [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
        )
        rows, columns = self.any.randint(0, 60), self.size((1, 2, 3, 7, 31, 32, 33, 64, 65), 70)
        values = self.normal(rows, columns)
        if self.chance(0.4):  # many equal ones
            values = (values * self.any.choice([1, 2, 4])).round() / 4
        if self.chance(0.3):
            values = torch.where(self.uniform(rows, 1) < 0.2, values[:, :1], values)
        values *= self.any.choice([1.0, 1.0, 1e-4, 1e4]) if case.kind is not torch.float16 else 1.0
        case.tensors["values"] = self.placed(values, case.kind)
        most = self.any.choice([None, 5, self.any.randint(1, columns + 2)])
        case.options["max_relevant"] = most
