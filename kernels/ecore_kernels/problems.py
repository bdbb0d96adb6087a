"""One call of an operator at one size: its random inputs, and the call. For :mod:`ecore_kernels.verify` and benchmarks.

Inputs have the model's layout: queries, keys and values [B, K, N, d] are transposed [B, N, K, d], as a
projection of [B, N, K * d] leaves them. There are two kinds of masks of words:

* ``all``: every context has M words and all of them take part in every resolution;
* ``real``: a batch as the data has them. Its longest context has M words (batches are padded to the longest),
  the others' lengths are log-normal with mean 38, 90th percentile 67 and 99th 126, redrawn until at most M. All
  words of a context take part in the coarsest resolution; in the finer ones ``[CLS]`` takes part, and a word with
  probability 1/37 and half of that (so about 2 and 1.5 of 38); a word of a finer resolution is also in the coarser
  ones.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.func import functional_call

from ecore_kernels.backends import use_backend
from ecore_kernels.graph import EmotionGraph
from ecore_kernels.module import MultiResolutionEdgeAttention
from ecore_kernels.operators.edge_attention import edge_attention
from ecore_kernels.operators.edge_readout import edge_readout
from ecore_kernels.operators.graph_attention import graph_attention
from ecore_kernels.operators.history import EdgeUpdate

PRECISIONS = ("tf32", "bfloat16", "ieee")
MASKS = ("all", "real")

# Logarithm of a context's length in words, [CLS] counted: location and scale.
LENGTH_LOCATION, LENGTH_SCALE = 3.43, 0.605
# Share of words that take part at the model's finer thresholds.
THRESHOLDS = (0.0, 0.075, 0.15)
SHARES = (1.0, 1 / 37, 0.5 / 37)

# Parameters of MultiResolutionEdgeAttention, whose edge_scale is one more.
WEIGHTS = ("query.weight", "key.weight", "value.weight", "gate.weight")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of an operator.

    Attributes:
        operator: "graph_attention", "edge_readout", "edge_attention", or "module": as many layers of
            MultiResolutionEdgeAttention in a row, and the readout of the edges that they leave.
        nodes: N, words and emotions.
        depth: layers of history; for edge_attention 1 if the call returns updated edges and 0 if not.
        masks: one of MASKS: which words take part.
        precision: "ieee" or "tf32" (float32 inputs), "bfloat16" or "float64". Edge weights and gates are float32 at
            least.
        variant: "" for the plain call; "words" for ``receivers="words"``; "per_word"; "shared" for edges that the
            batch shares; "relevant" for a graph of some of the emotions, with a correlation for each context.
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
    variant: str = ""

    @property
    def words(self) -> int:
        return self.nodes - self.emotions

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        return {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(self.precision, torch.float32)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of edge weights and gates."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def dense_bytes(self) -> int:
        """Of one float32 [B, K, N, N]."""
        return 4 * self.batch * self.resolutions * self.nodes**2

    @property
    def leaves(self) -> tuple[str, ...]:
        """The inputs that get gradients."""
        if self.operator == "edge_attention":
            return ("query", "key", "value", "edge", *(("gate", "edge_scale") if self.depth else ()))
        if self.operator == "module":
            weights = [f"{name}{m}" for m in range(self.depth) for name in WEIGHTS]
            return ("nodes", *weights, "emotion_weight", "correlation")
        past = [f"{name}{m}" for m in range(self.depth) for name in ("query", "key", "gate", "edge_scale")]
        own = ("query", "key", "value") if self.operator == "graph_attention" else ()
        return (*own, *past, "emotion_weight", "correlation")


def set_precision(precision: str) -> None:
    """Set PyTorch's precision of float32 products; with bfloat16 inputs, the fastest."""
    torch.set_float32_matmul_precision("highest" if precision in ("ieee", "float64") else "high")


def draw_lengths(batch: int, words: int, generator: torch.Generator) -> Tensor:
    """[batch] lengths of real contexts, [CLS] counted: the longest is ``words``."""
    lengths = torch.full((batch,), words)
    for b in range(1, batch):
        drawn = math.inf
        while drawn > words:
            normal = float(torch.randn((), generator=generator))
            drawn = max(min(2, words), round(math.exp(LENGTH_LOCATION + LENGTH_SCALE * normal)))
            drawn = min(drawn, words) if words < 8 else drawn  # hardly any context is that short
        lengths[b] = drawn
    return lengths


def draw_graph(problem: Problem, generator: torch.Generator) -> EmotionGraph:
    """A float32 graph on the CPU; no word's weight is 0, so that a mistake in any of them is seen."""
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
    emotion_mask = None
    if problem.variant == "relevant":
        correlation = torch.randn(batch, emotions, emotions, generator=generator).softmax(-1)
        emotion_mask = torch.rand(batch, emotions, generator=generator) < 0.5
        emotion_mask[:, 0] = True
    return EmotionGraph.from_intensity(
        intensity, lengths, thresholds, correlation, emotion_weight, emotion_mask
    )


def draw(problem: Problem, seed: int, device: str) -> dict[str, Tensor]:
    """All tensors of one call by name, none requiring gradients: inputs, and ``upstream0``, ... for the backward."""
    generator = torch.Generator().manual_seed(seed)
    graph = draw_graph(problem, generator)
    # Large tensors are drawn where they are used.
    device_generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = problem.weight_dtype) -> Tensor:
        return torch.randn(shape, generator=device_generator, device=device, dtype=dtype)

    lead = (problem.batch, problem.resolutions, problem.nodes)
    batch, emotions, width = problem.batch, problem.emotions, problem.resolutions * problem.dim

    def rows(nodes: int = problem.nodes) -> Tensor:
        return normal(batch, nodes, problem.resolutions, problem.dim, dtype=problem.dtype).transpose(1, 2)

    tensors = {
        name: getattr(graph, name).to(device, problem.weight_dtype)
        for name in ("word_weight", "emotion_weight", "correlation")
    }
    tensors["word_mask"] = graph.word_mask.to(device)
    if graph.emotion_mask is not None:
        tensors["emotion_mask"] = graph.emotion_mask.to(device)
    one = torch.ones((), device=device, dtype=problem.weight_dtype)
    readout = [(batch, emotions), (batch, emotions, emotions)]
    if problem.variant == "per_word":
        readout[0] = (batch, problem.words, emotions)
    outputs: list[tuple[int, ...]] = [(*lead, problem.dim)]
    if problem.operator == "module":
        tensors["nodes"] = normal(batch, problem.nodes, width, dtype=problem.dtype)
        for m in range(problem.depth):
            for name in WEIGHTS:
                out = problem.resolutions if name == "gate.weight" else width
                tensors[f"{name}{m}"] = normal(out, width, dtype=problem.dtype) * width**-0.5
            tensors[f"edge_scale{m}"] = one.to(problem.dtype)
        outputs += readout
    elif problem.operator == "edge_readout":
        outputs = readout
    else:
        tensors |= {name: rows() for name in ("query", "key", "value")}
    if problem.operator == "edge_attention":
        tensors["edge"], tensors["neighbors"] = graph_of(tensors).dense()
        if problem.variant == "shared":
            tensors["edge"] = tensors["edge"][:1].contiguous()
        if problem.depth:
            tensors |= {"gate": normal(*lead), "edge_scale": one}
            outputs.append((*lead, problem.nodes))
    elif problem.operator != "module":
        for m in range(problem.depth):
            tensors |= {f"query{m}": rows(), f"key{m}": rows(), f"gate{m}": normal(*lead)}
            tensors[f"edge_scale{m}"] = one.clone()
    for index, shape in enumerate(outputs):
        # In a model the projection after the heads passes back its gradient with the heads side by side.
        nodes = index == 0 and problem.operator != "edge_readout"
        receivers = problem.words if problem.variant == "words" else problem.nodes
        tensors[f"upstream{index}"] = rows(receivers) if nodes else normal(*shape)
    return tensors


def graph_of(tensors: dict[str, Tensor]) -> EmotionGraph:
    """The emotion graph among the tensors of a call."""
    return EmotionGraph(
        tensors["word_weight"],
        tensors["word_mask"],
        tensors["emotion_weight"],
        tensors["correlation"],
        tensors.get("emotion_mask"),
    )


def history_of(problem: Problem, tensors: dict[str, Tensor]) -> list[EdgeUpdate]:
    """The earlier layers among the tensors of a call."""
    names = ("query", "key", "gate", "edge_scale")
    return [EdgeUpdate(*(tensors[f"{name}{m}"] for name in names)) for m in range(problem.depth)]


def layer_weights(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The parameters of one MultiResolutionEdgeAttention among the tensors of a call."""
    return {name: tensors[f"{name}{layer}"] for name in (*WEIGHTS, "edge_scale")}


def call(problem: Problem, tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    """The public operator on a backend: its outputs."""
    if problem.operator == "edge_attention":
        outputs = edge_attention(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            tensors["edge"],
            tensors["neighbors"],
            gate=tensors.get("gate"),
            edge_scale=tensors.get("edge_scale"),
            scale=problem.scale,
            backend=backend,
        )
        return tuple(output for output in outputs if output is not None)
    graph = graph_of(tensors)
    if problem.operator == "module":
        return _call_layers(problem, tensors, graph, backend)
    history = history_of(problem, tensors)
    if problem.operator == "edge_readout":
        per_word = problem.variant == "per_word"
        return edge_readout(graph, history, scale=problem.scale, per_word=per_word, backend=backend)
    output = graph_attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        graph,
        history,
        scale=problem.scale,
        receivers="words" if problem.variant == "words" else "all",
        backend=backend,
    )
    return (output,)


def _call_layers(
    problem: Problem, tensors: dict[str, Tensor], graph: EmotionGraph, backend: str
) -> tuple[Tensor, ...]:
    with torch.device("meta"):  # its parameters are among the tensors
        layer = MultiResolutionEdgeAttention(
            problem.resolutions * problem.dim, problem.resolutions, bias=False
        )
    nodes = tensors["nodes"]
    history: list[EdgeUpdate] = []
    with use_backend(backend):
        for m in range(problem.depth):
            nodes, update = functional_call(layer, layer_weights(tensors, m), (nodes, graph, history))
            history.append(update)
        readout = edge_readout(graph, history, scale=layer.scale)
    return nodes.unflatten(-1, (problem.resolutions, problem.dim)).transpose(1, 2), *readout


def asking(tensors: dict[str, Tensor], leaves: tuple[str, ...]) -> dict[str, Tensor]:
    """The same tensors; those in ``leaves`` require gradients."""
    return tensors | {name: tensors[name].detach().requires_grad_() for name in leaves}


def upstream(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The gradients of a call's outputs."""
    return [tensors[name] for name in sorted(tensors) if name.startswith("upstream")]
