"""One call of an operator at one size: its random inputs, how any candidate is called, and the float64 oracle.

Inputs have the model's layout: queries, keys and values [B, K, N, d] are transposed [B, N, K, d], as a
projection of [B, N, K * d] leaves them. Words take part in one of two ways:

* ``all``: every context has M words and all of them take part in every resolution;
* ``real``: a batch as the data has them. Its longest context has M words (batches are padded to the longest),
  the others' lengths are log-normal with mean 38, 90th percentile 67 and 99th 126, redrawn until at most M. All
  words of a context take part in the coarsest resolution; in the finer ones take part ``[CLS]`` and a word with
  probability 1/37 and half of that (so about 2 and 1.5 of 38), a word of a finer resolution being one of the
  coarser too.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ecore_kernels import EdgeUpdate, EmotionGraph, edge_attention, edge_readout, graph_attention, reference
from ecore_kernels.attention import row_factor

OPERATORS = ("graph_attention", "edge_readout", "edge_attention")
PRECISIONS = ("tf32", "bfloat16", "ieee")
MASKS = ("all", "real")
DIRECTIONS = ("forward", "forward+backward")

# Logarithm of a context's length in words, [CLS] counted: location and scale.
LENGTH_LOCATION, LENGTH_SCALE = 3.43, 0.605
# Share of words that take part at the model's finer thresholds.
THRESHOLDS = (0.0, 0.075, 0.15)
SHARES = (1.0, 1 / 37, 0.5 / 37)

# From this many nodes on the oracle judges some receivers only: float64 N x N tensors would not fit.
LARGEST_FULL_CHECK = 2048
RECEIVERS_CHECKED = 192
INPUT_BYTES = 2**28  # to rotate among: more than a last-level cache holds
MOST_SETS = {"cpu": 8, "cuda": 32}
# Largest relative error that a right answer has, in the Frobenius norm; a tenfold of it, relative to the
# largest element, for the worst element.
LIMITS = {"ieee": 2e-5, "tf32": 5e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is asked of an operator.

    Attributes:
        operator: one of OPERATORS. nodes: N, words and emotions. depth: layers of history; for edge_attention 1
        if the call returns updated edges and 0 if not. masks: one of MASKS: which words take part. precision:
        "ieee" or "tf32" (float32 inputs), or "bfloat16". Edge weights and gates are float32 always.
    """

    operator: str
    nodes: int
    batch: int = 16
    resolutions: int = 3
    emotions: int = 32
    dim: int = 100
    depth: int = 1
    masks: str = "all"
    precision: str = "ieee"

    @property
    def words(self) -> int:
        return self.nodes - self.emotions

    def allows(self, errors: tuple[float, float]) -> bool:
        """Whether an answer that is off by so much, in norm and in its worst element, is right."""
        limit = LIMITS[self.precision]
        return errors[0] <= limit and errors[1] <= 10 * limit

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def dense_bytes(self) -> int:
        """Of one float32 [B, K, N, N]."""
        return 4 * self.batch * self.resolutions * self.nodes**2

    @property
    def leaves(self) -> tuple[str, ...]:
        """The inputs that get gradients."""
        if self.operator == "edge_attention":
            return ("query", "key", "value", "edge", *(("gate", "edge_scale") if self.depth else ()))
        past = [f"{name}{m}" for m in range(self.depth) for name in ("query", "key", "gate", "edge_scale")]
        own = ("query", "key", "value") if self.operator == "graph_attention" else ()
        return (*own, *past, "emotion_weight", "correlation")


def set_precision(precision: str) -> None:
    """Ask PyTorch for float32 products in that precision; beside bfloat16 inputs, in the fastest."""
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")


def draw_lengths(batch: int, words: int, generator: torch.Generator) -> Tensor:
    """[batch] lengths of real contexts, [CLS] counted: the longest is ``words``."""
    lengths = torch.full((batch,), words)
    for b in range(1, batch):
        drawn = math.inf
        while drawn > words:
            normal = float(torch.randn((), generator=generator))
            drawn = max(min(2, words), round(math.exp(LENGTH_LOCATION + LENGTH_SCALE * normal)))
            drawn = min(drawn, words) if words < 8 else drawn  # hardly a context is that short
        lengths[b] = drawn
    return lengths


def draw_graph(problem: Problem, generator: torch.Generator) -> EmotionGraph:
    """A float32 graph on the CPU; no word's weight is 0, so that a mistake in any shows."""
    batch, words, emotions = problem.batch, problem.words, problem.emotions
    correlation = torch.randn(emotions, emotions, generator=generator).softmax(-1)
    emotion_weight = torch.randn(batch, emotions, generator=generator).softmax(-1)
    uniform = torch.rand(batch, words, generator=generator)
    if problem.masks == "all":
        lengths, intensity = torch.full((batch,), words), 0.01 + 0.24 * uniform
        thresholds: tuple[float, ...] = (0.0,) * problem.resolutions
    else:
        lengths = draw_lengths(batch, words, generator)
        thresholds = tuple(THRESHOLDS[min(k, len(THRESHOLDS) - 1)] for k in range(problem.resolutions))
        fine, finest = SHARES[1:]
        low = torch.where(uniform < finest, 0.15, torch.where(uniform < fine, 0.075, 0.01))
        intensity = low + 0.06 * torch.rand(batch, words, generator=generator)
    return EmotionGraph.from_intensity(intensity, lengths, thresholds, correlation, emotion_weight)


def draw(problem: Problem, seed: int, device: str) -> dict[str, Tensor]:
    """All tensors of one call by name, none asking for gradients: inputs, and ``upstream0``, ... for the backward."""
    generator = torch.Generator().manual_seed(seed)
    graph = draw_graph(problem, generator)
    # Large tensors are drawn where they are used.
    device_generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=device_generator, device=device, dtype=dtype)

    lead = (problem.batch, problem.resolutions, problem.nodes)

    def rows() -> Tensor:
        batch, resolutions, nodes = lead
        return normal(batch, nodes, resolutions, problem.dim, dtype=problem.dtype).transpose(1, 2)

    tensors = {
        "word_weight": graph.word_weight.to(device),
        "word_mask": graph.word_mask.to(device),
        "emotion_weight": graph.emotion_weight.to(device),
        "correlation": graph.correlation.to(device),
    }
    if problem.operator != "edge_readout":
        tensors |= {name: rows() for name in ("query", "key", "value")}
    one = torch.ones((), device=device)
    if problem.operator == "edge_attention":
        tensors["edge"], tensors["neighbors"] = graph_of(tensors).dense()
        outputs: list[tuple[int, ...]] = [(*lead, problem.dim)]
        if problem.depth:
            tensors |= {"gate": normal(*lead), "edge_scale": one}
            outputs.append((*lead, problem.nodes))
    else:
        for m in range(problem.depth):
            tensors |= {f"query{m}": rows(), f"key{m}": rows(), f"gate{m}": normal(*lead)}
            tensors[f"edge_scale{m}"] = one.clone()
        batch, emotions = problem.batch, problem.emotions
        readout = [(batch, emotions), (batch, emotions, emotions)]
        outputs = readout if problem.operator == "edge_readout" else [(*lead, problem.dim)]
    for index, shape in enumerate(outputs):
        # A model's projection behind the heads sends its gradient with the heads side by side.
        nodes = index == 0 and problem.operator != "edge_readout"
        tensors[f"upstream{index}"] = rows() if nodes else normal(*shape)
    return tensors


def draw_sets(problem: Problem, device: str) -> list[dict[str, Tensor]]:
    """Two sets of tensors or more, to rotate among: together more than a last-level cache holds, where so many do."""
    first = draw(problem, 0, device)
    size = sum(x.nbytes for x in first.values())
    count = max(2, min(MOST_SETS[device], INPUT_BYTES // size))
    return [first, *(draw(problem, seed, device) for seed in range(1, count))]


def graph_of(tensors: dict[str, Tensor]) -> EmotionGraph:
    """The emotion graph among the tensors of a call."""
    names = ("word_weight", "word_mask", "emotion_weight", "correlation")
    return EmotionGraph(*(tensors[name] for name in names))


def history_of(problem: Problem, tensors: dict[str, Tensor]) -> list[EdgeUpdate]:
    """The earlier layers among the tensors of a call."""
    names = ("query", "key", "gate", "edge_scale")
    return [EdgeUpdate(*(tensors[f"{name}{m}"] for name in names)) for m in range(problem.depth)]


def call(problem: Problem, tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    """The public operator on a backend: its outputs."""
    nodes = [tensors.get(name) for name in ("query", "key", "value")]
    if problem.operator == "edge_attention":
        outputs = edge_attention(
            *nodes,
            tensors["edge"],
            tensors["neighbors"],
            gate=tensors.get("gate"),
            edge_scale=tensors.get("edge_scale"),
            scale=problem.scale,
            backend=backend,
        )
        return tuple(output for output in outputs if output is not None)
    graph, history = graph_of(tensors), history_of(problem, tensors)
    if problem.operator == "edge_readout":
        return edge_readout(graph, history, scale=problem.scale, backend=backend)
    return (graph_attention(*nodes, graph, history, scale=problem.scale, backend=backend),)


def plain(problem: Problem, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The reference without the checks and the registration around it: what a compiler sees through."""
    nodes = [tensors.get(name) for name in ("query", "key", "value")]
    if problem.operator == "edge_attention":
        gate, edge_scale = tensors.get("gate"), tensors.get("edge_scale")
        output, new_edge = reference.edge_attention(
            *nodes, tensors["edge"], tensors["neighbors"], gate, edge_scale, problem.scale
        )
        output = output.to(problem.dtype)
        return (output,) if new_edge is None else (output, new_edge)
    graph, history = graph_of(tensors), history_of(problem, tensors)
    past = [update.query for update in history], [update.key for update in history], row_factor(history)
    if problem.operator == "edge_readout":
        return reference.edge_readout(graph, *past, problem.scale, False)
    return (reference.graph_attention(*nodes, graph, *past, problem.scale, False).to(problem.dtype),)


def asking(tensors: dict[str, Tensor], leaves: tuple[str, ...]) -> dict[str, Tensor]:
    """The same tensors, those in ``leaves`` asking for gradients."""
    return tensors | {name: tensors[name].detach().requires_grad_() for name in leaves}


def upstream(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The gradients of a call's outputs."""
    return [tensors[name] for name in sorted(tensors) if name.startswith("upstream")]


@dataclasses.dataclass(frozen=True)
class Oracle:
    """What a right answer is, in float64.

    Attributes:
        receivers: the rows that are judged; None for all. upstream: gradients of the outputs to use, 0 in rows
        that are not judged, so that gradients are right in full. outputs: by number, in the judged rows alone.
        gradients: by name; of ``edge`` in the judged rows alone. sums: by name, what a gradient that is one sum
        of many terms is measured by, where they cancel: their norm.
    """

    receivers: Tensor | None
    upstream: list[Tensor]
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    sums: dict[str, float]

    def errors(self, outputs: list[Tensor], gradients: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Relative errors of an answer in the Frobenius norm, and of its worst element, by what they are in."""
        found = {}
        for index, output in enumerate(outputs):
            rows = output if self.receivers is None else output[:, :, self.receivers]
            found[f"output{index}"] = relative_error(rows, self.outputs[index])
        for name, gradient in gradients.items():
            judged = (
                gradient[:, :, self.receivers] if name == "edge" and self.receivers is not None else gradient
            )
            found[f"gradient of {name}"] = relative_error(
                judged, self.gradients[name], self.sums.get(name, 0.0)
            )
        return found


def relative_error(actual: Tensor, exact: Tensor, least: float = 0.0) -> tuple[float, float]:
    """||actual - exact|| / ||exact||, and the same of the largest elements; infinite where something is not finite.

    The divisor is ``least`` at least.
    """
    difference = actual.double() - exact
    if not bool(difference.isfinite().all()):
        return math.inf, math.inf
    errors = []
    for size in (torch.linalg.vector_norm, lambda x: x.abs().max()):
        wanted, got = max(float(size(exact)), least), float(size(difference))
        errors.append(got / wanted if wanted else (math.inf if got else 0.0))
    return errors[0], errors[1]


def oracle(problem: Problem, tensors: dict[str, Tensor], backward: bool) -> Oracle:
    """The right answer in float64: the paper's layer-by-layer recurrence with its edges in memory.

    edge_readout's is the reference in float64: its edges after several layers are N x N. Where N is large, the
    attention operators are judged in some receivers (``[CLS]``, emotions, random words): a receiver's row needs
    no other row.
    """
    receivers = None
    if problem.nodes > LARGEST_FULL_CHECK and problem.operator != "edge_readout":
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(problem.words - 1, generator=generator)[: RECEIVERS_CHECKED - 1] + 1
        emotional = torch.arange(problem.words, problem.nodes)
        receivers = torch.cat([torch.zeros(1, dtype=torch.long), some, emotional]).to(
            tensors["word_mask"].device
        )

    def rows(tensor: Tensor) -> Tensor:
        return tensor if receivers is None else tensor[:, :, receivers]

    # Only its judged rows: all of them in float64 would not fit.
    wide = {name: rows(x) if name in ("edge", "neighbors") else x for name, x in tensors.items()}
    wide = {name: x.double() if x.is_floating_point() else x for name, x in wide.items()}
    leaves = problem.leaves if backward else ()
    wide = asking(wide, leaves)
    if problem.operator == "edge_readout":
        outputs = list(plain(problem, wide))
    else:
        if problem.operator == "edge_attention":
            edge, neighbors = wide["edge"], wide["neighbors"]
        elif receivers is None:
            edge, neighbors = graph_of(wide).dense()
        else:  # dense() only places numbers: nothing is lost in float32
            narrow = {n: x.float() if x.is_floating_point() else x for n, x in wide.items()}
            edge, neighbors = map(rows, graph_of(narrow).dense())
            edge = edge.double()
        for update in history_of(problem, wide) if problem.operator == "graph_attention" else ():
            _, edge = reference.edge_attention(
                rows(update.query), update.key, update.key, edge, neighbors, rows(update.gate),
                update.edge_scale, problem.scale,
            )  # fmt: skip
        gate = rows(wide["gate"]) if "gate" in wide else None
        found = reference.edge_attention(
            rows(wide["query"]), wide["key"], wide["value"], edge, neighbors, gate, wide.get("edge_scale"),
            problem.scale,
        )  # fmt: skip
        outputs = [output for output in found if output is not None]
    sent = upstream(tensors)
    if not backward:
        return Oracle(receivers, sent, outputs, {}, {})
    if receivers is not None:
        sent = [torch.zeros_like(x).index_copy_(2, receivers, rows(x)) for x in sent]
    found = torch.autograd.grad(outputs, [wide[name] for name in leaves], [rows(x).double() for x in sent])
    gradients = dict(zip(leaves, found, strict=True))
    # edge_scale's gradient adds up those of all gates, times the gates.
    sums = {}
    for name in leaves:
        if name.startswith("edge_scale"):
            gate = name.replace("edge_scale", "gate")
            sums[name] = float(torch.linalg.vector_norm(wide[gate].detach() * gradients[gate]))
    return Oracle(receivers, sent, [x.detach() for x in outputs], gradients, sums)
