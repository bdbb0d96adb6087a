"""Random inputs for the operators, and a slow oracle written from the paper's equations, a row at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ecore_kernels import EdgeUpdate, EmotionGraph, native, triton_kernels, use_backend
from tests.kernels.interpreter import quicken

quicken()

BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not native.available(), reason="the compiled extension is missing"),
    ),
    pytest.param(
        "interpreter",
        marks=pytest.mark.skipif(
            not triton_kernels.INTERPRETED or bool(triton_kernels.unavailable_reason()),
            reason="Triton's interpreter is not in use: TRITON_INTERPRET is not 1, or Triton is missing",
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skip what asks Triton for float64 where the installed one is too old for it, and the operator says so."""
    try:
        return (yield)
    except RuntimeError as error:
        old = triton_kernels.INTERPRETED and triton_kernels._lacks_float64()
        if not old or "newer for float64" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on every backend: PyTorch, C++, Triton's interpreter, and Triton on a GPU with all tensors there."""
    with use_backend({"interpreter": "triton", "cuda": "triton"}.get(request.param, request.param)):
        if request.param != "cuda":
            yield request.param
        else:
            with torch.device("cuda"):
                yield request.param


def random_graph(
    batch: int = 2,
    words: int = 5,
    emotions: int = 4,
    resolutions: int = 3,
    *,
    correlation: str = "shared",
    masked: bool = True,
    dtype: torch.dtype = torch.float64,
) -> EmotionGraph:
    """Scattered participants, anything in slot 0, a resolution of which all words are screened out."""
    word_mask = torch.rand(batch, resolutions, words) > 0.4
    word_mask[:, 0] = True
    word_mask[0, -1, 1:] = False
    if resolutions > 1:
        word_mask[0, -1, 0] = False  # [CLS] takes part whatever stands there
    lead = {"shared": (emotions, emotions), "batched": (batch, emotions, emotions)}[correlation]
    emotion_mask = torch.rand(batch, emotions) > 0.4
    emotion_mask[0, 0] = True
    return EmotionGraph(
        torch.rand(batch, words, dtype=dtype),
        word_mask,
        torch.rand(batch, emotions, dtype=dtype).requires_grad_(),
        torch.randn(lead, dtype=dtype).softmax(-1).requires_grad_(),
        emotion_mask if masked else None,
    )


def random_update(
    graph: EmotionGraph, dim: int, *, gated: bool = True, dtype: torch.dtype = torch.float64
) -> EdgeUpdate:
    """One layer's queries, keys, gates and edge scale for ``graph``, all asking for gradients."""
    batch, resolutions, words, emotions = graph.shape
    lead = (batch, resolutions, words + emotions)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    gate, edge_scale = (leaf(*lead), leaf()) if gated else (None, None)
    return EdgeUpdate(leaf(*lead, dim), leaf(*lead, dim), gate, edge_scale)


def random_value(graph: EmotionGraph, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values [B, K, N, dim] that ask for gradients."""
    batch, resolutions, words, emotions = graph.shape
    return torch.randn(batch, resolutions, words + emotions, dim, dtype=dtype).requires_grad_()


def spell_out(graph: EmotionGraph) -> tuple[Tensor, Tensor]:
    """E0 and neighbours [B, K, N, N], node pair by node pair from the table of who hears whom."""
    batch, resolutions, words, emotions = graph.shape
    nodes = words + emotions
    word_mask = graph.word_mask.tolist()
    emotion_mask = [[True] * emotions] * batch if graph.emotion_mask is None else graph.emotion_mask.tolist()
    zero = torch.zeros((), dtype=graph.correlation.dtype)
    edges, neighbors = [], []
    for b, k, i, j in product(range(batch), range(resolutions), range(nodes), range(nodes)):
        takes_part = [True, *word_mask[b][k][1:], *emotion_mask[b]]
        if i == 0:
            hears = True
        elif i < words:
            hears = j <= i or j >= words
        else:
            hears = j == 0 or (j >= words and j != i)
        hears = hears and takes_part[i] and takes_part[j]
        if not hears:
            weight = zero
        elif j == 0:
            weight = zero + 1.0
        elif j < words:
            weight = graph.word_weight[b, j]
        elif i < words:
            weight = graph.emotion_weight[b, j - words]
        else:
            correlation = graph.correlation if graph.correlation.dim() == 2 else graph.correlation[b]
            weight = correlation[i - words, j - words]
        edges.append(weight)
        neighbors.append(hears)
    shape = (batch, resolutions, nodes, nodes)
    return torch.stack(edges).view(shape), torch.tensor(neighbors).view(shape)


def one_layer(
    update: EdgeUpdate, value: Tensor, edge: Tensor, neighbors: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and next edges of one layer (Eqs. 4 to 7), a receiver at a time over its own neighbours only."""
    batch, resolutions, nodes, _ = update.query.shape
    outputs, new_edges = [], []
    for b, k, i in product(range(batch), range(resolutions), range(nodes)):
        who = neighbors[b, k, i].nonzero()[:, 0]
        weighted = (
            scale * (update.key[b, k, who] @ update.query[b, k, i]) * edge[b, k, i, who]
        )  # A-hat, Eq. 7
        attention = weighted.exp() / weighted.exp().sum()  # Eq. 6
        outputs.append(attention @ value[b, k, who])  # Eq. 4; an empty product is 0
        factor = 1.0 if update.gate is None else update.gate[b, k, i] * update.edge_scale
        new = factor * (edge[b, k, i, who] + weighted)  # Eq. 5
        new_edges.append(torch.zeros(nodes, dtype=edge.dtype).index_put((who,), new))
    lead = (batch, resolutions, nodes)
    return torch.stack(outputs).view(*lead, value.shape[3]), torch.stack(new_edges).view(*lead, nodes)


def layers(
    graph: EmotionGraph, updates: Sequence[EdgeUpdate], values: Sequence[Tensor], scale: float
) -> tuple[list[Tensor], Tensor]:
    """Every layer's output on ``graph``, and the edges after the last one."""
    edge, neighbors = spell_out(graph)
    outputs = []
    for update, value in zip(updates, values, strict=True):
        output, edge = one_layer(update, value, edge, neighbors, scale)
        outputs.append(output)
    return outputs, edge


@pytest.fixture
def make() -> SimpleNamespace:
    """Random inputs: ``graph``, ``update``, ``value``."""
    return SimpleNamespace(graph=random_graph, update=random_update, value=random_value)


@pytest.fixture
def oracle() -> SimpleNamespace:
    """The slow implementation: ``spell_out``, ``one_layer``, ``layers``."""
    return SimpleNamespace(spell_out=spell_out, one_layer=one_layer, layers=layers)


def same_gradients(
    actual: Sequence[Tensor], expected: Sequence[Tensor], leaves: Sequence[Tensor], tolerance: float = 1e-12
) -> None:
    """Assert that outputs are equal, and that random weights on them send equal gradients to the leaves."""
    torch.testing.assert_close(list(actual), list(expected), rtol=tolerance, atol=tolerance)
    weights = [torch.randn_like(tensor) for tensor in actual]
    got = torch.autograd.grad(list(actual), leaves, weights, allow_unused=True)
    wanted = torch.autograd.grad(list(expected), leaves, weights, allow_unused=True)
    for leaf, one, other in zip(leaves, got, wanted, strict=True):
        one, other = (torch.zeros_like(leaf) if g is None else g for g in (one, other))
        largest = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, largest))


@pytest.fixture
def assert_same():
    """Compare outputs and all gradients: ``assert_same(actual, expected, leaves)``."""
    return same_gradients
