"""The fused edge_readout, launcher by launcher, against the reference: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ecore_kernels import EmotionGraph, reference

pytest.importorskip("triton")

from tests.kernels.triton.fused import Fused

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")

edge_readout = Fused("edge_readout")

SCALE = 0.6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def random_history(
    graph: EmotionGraph, dim: int, depth: int, dtype: torch.dtype, *, transposed: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys [B, K, N, dim] of ``depth`` layers; transposed: made as [B, N, K, dim]."""
    batch, resolutions, words, emotions = graph.shape

    def rows() -> Tensor:
        if transposed:
            leaf = torch.randn(batch, words + emotions, resolutions, dim, dtype=dtype).transpose(1, 2)
        else:
            leaf = torch.randn(batch, resolutions, words + emotions, dim, dtype=dtype)
        return leaf.requires_grad_()

    return [rows() for _ in range(depth)], [rows() for _ in range(depth)]


def random_factor(graph: EmotionGraph, dtype: torch.dtype) -> Tensor:
    """r [B, K, N], some of it 0."""
    batch, resolutions, words, emotions = graph.shape
    factor = torch.randn(batch, resolutions, words + emotions, dtype=dtype)
    return factor.masked_fill(torch.rand_like(factor) < 0.1, 0.0).requires_grad_()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the expected norm."""
    assert actual.shape == expected.shape
    error, size = (actual.cpu().double() - expected.double()).norm(), expected.double().norm()
    # Fails for NaN; zeros have to be exact.
    assert error <= tolerance * size, f"relative error {error / size:.2e}"


def check(
    graph: EmotionGraph,
    history: tuple[list[Tensor], list[Tensor]],
    factor: Tensor | None,
    device: torch.device,
    *,
    per_word: bool = False,
) -> None:
    """Compare both launchers with the reference and its autograd, in float64, on the same inputs."""
    query, key = history
    dtype = (*query, graph.emotion_weight)[0].dtype

    def double(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_()

    def here(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(device)  # keeps the strides

    exact = EmotionGraph(
        graph.word_weight,
        graph.word_mask,
        double(graph.emotion_weight),
        double(graph.correlation),
        graph.emotion_mask,
    )
    exact_query, exact_key, exact_factor = [*map(double, query)], [*map(double, key)], double(factor)
    expected = reference.edge_readout(exact, exact_query, exact_key, exact_factor, SCALE, per_word)
    upstream = [torch.randn_like(x, dtype=dtype) for x in expected]
    leaves = [*exact_query, *exact_key, exact_factor, exact.emotion_weight, exact.correlation]
    leaves = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(expected, leaves, [x.double() for x in upstream])

    arguments = (
        here(graph.word_mask), here(graph.emotion_weight), here(graph.correlation), here(graph.emotion_mask),
        [*map(here, query)], [*map(here, key)], here(factor), SCALE, per_word, "ieee",
    )  # fmt: skip
    outputs = edge_readout.forward(*arguments)
    actual = [
        *outputs,
        *edge_readout.backward(*map(here, upstream), *arguments[:-1], all_of(query, factor), "ieee"),
    ]
    for one, other in zip(actual, [*expected, *gradients], strict=True):
        assert one.dtype == dtype
        assert_close(one, other, TOLERANCE[dtype])


def all_of(query: list[Tensor], factor: Tensor | None) -> list[bool]:
    """That every gradient is needed."""
    return [True] * (2 * len(query)) + [factor is not None, True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_depth(make, device, depth, dtype):
    graph = make.graph(dtype=dtype)
    check(graph, random_history(graph, 3, depth, dtype), random_factor(graph, dtype), device)


@pytest.mark.parametrize("per_word", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("correlation", ["shared", "batched"])
def test_options(make, device, correlation, masked, per_word):
    """Several blocks of words, of emotions and of columns."""
    graph = make.graph(2, 18, 17, 2, correlation=correlation, masked=masked)
    history = random_history(graph, 5, 1, torch.float64)
    check(graph, history, random_factor(graph, torch.float64), device, per_word=per_word)


@pytest.mark.parametrize(
    "words, emotions, dim",
    [(1, 1, 1), (1, 3, 7), (4, 1, 2), (17, 16, 3), (33, 5, 100), (6, 2, 128), (3, 4, 130)],
)
def test_sizes(make, device, words, emotions, dim):
    graph = make.graph(1, words, emotions, 2)
    check(graph, random_history(graph, dim, 1, torch.float64), None, device)


def test_many_emotions(make, device):
    graph = make.graph(1, 4, 34, 1, dtype=torch.float32)
    check(graph, random_history(graph, 4, 2, torch.float32), random_factor(graph, torch.float32), device)


@pytest.mark.parametrize("depth", [0, 2])
def test_without_row_factor(make, device, depth):
    graph = make.graph(2, 18, 4)
    check(graph, random_history(graph, 3, depth, torch.float64), None, device, per_word=True)


def test_transposed_history(make, device):
    """Heads side by side in memory, as a linear layer leaves them; one tensor is laid out in another way."""
    graph = make.graph(2, 5, 4, 3)
    query, key = random_history(graph, 6, 2, torch.float64, transposed=True)
    key[1] = key[1].detach().contiguous().requires_grad_()
    check(graph, (query, key), random_factor(graph, torch.float64), device)


@pytest.mark.parametrize("stride", ["broadcast", "sliced"])
def test_awkward_strides(make, device, stride):
    """History and graph that are views: expanded over resolutions, or every other element of a wider tensor."""
    graph = make.graph(2, 5, 4, 3, correlation="batched")
    query, key = random_history(graph, 6, 1, torch.float64)
    if stride == "broadcast":
        query = [x.detach()[:, :1].expand_as(x) for x in query]
    else:
        query = [torch.randn(*x.shape[:3], 12, dtype=x.dtype)[..., ::2] for x in query]
    awkward = EmotionGraph(
        graph.word_weight,
        graph.word_mask.transpose(1, 2).contiguous().transpose(1, 2),
        graph.emotion_weight.detach()[:, :1].expand_as(graph.emotion_weight),
        graph.correlation.detach().mT,
        graph.emotion_mask.mT.contiguous().mT,
    )
    check(awkward, (query, key), random_factor(graph, torch.float64), device)


def with_masks(graph: EmotionGraph, word_mask: Tensor, emotion_mask: Tensor | None) -> EmotionGraph:
    return EmotionGraph(graph.word_weight, word_mask, graph.emotion_weight, graph.correlation, emotion_mask)


def test_only_cls_takes_part(make, device):
    graph = make.graph(2, 19, 4, 2)
    graph = with_masks(graph, torch.zeros_like(graph.word_mask), graph.emotion_mask)
    check(graph, random_history(graph, 3, 2, torch.float64), random_factor(graph, torch.float64), device)


@pytest.mark.parametrize("relevant", [0, 1])
def test_hardly_an_emotion_takes_part(make, device, relevant):
    """One emotion, heard by words alone; or none, and every result is 0."""
    graph = make.graph(2, 5, 18, 2)
    emotion_mask = torch.arange(18).expand(2, -1) < relevant
    graph = with_masks(graph, graph.word_mask, emotion_mask)
    history, factor = random_history(graph, 3, 2, torch.float64), random_factor(graph, torch.float64)
    check(graph, history, factor, device, per_word=True)


def test_factors_of_zero(device):
    """With 1 + s = 0 in one layer, the gradient of that layer alone is not 0."""
    batch, resolutions, words, emotions = 1, 1, 3, 2
    graph = EmotionGraph(
        torch.rand(batch, words, dtype=torch.float64),
        torch.ones(batch, resolutions, words, dtype=torch.bool),
        torch.rand(batch, emotions, dtype=torch.float64),
        torch.rand(emotions, emotions, dtype=torch.float64),
    )
    query, key = random_history(graph, 1, 2, torch.float64)
    query[0] = torch.full_like(query[0], -1 / SCALE)
    key[0] = torch.ones_like(key[0])
    check(graph, (query, key), random_factor(graph, torch.float64), device)


def test_nodes_that_take_no_part_are_not_read(make, device):
    graph = make.graph(2, 9, 6, 2, masked=True, dtype=torch.float64)
    query, key = random_history(graph, 3, 2, torch.float64)
    factor = random_factor(graph, torch.float64)
    off = ~graph.participants()
    arguments = [
        graph.word_mask, graph.emotion_weight, graph.correlation, graph.emotion_mask, query, key, factor,
        SCALE, False, "ieee",
    ]  # fmt: skip
    upstream = [torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, 6, dtype=torch.float64)]

    def results() -> list[Tensor]:
        moved = [
            x.detach().to(device) if isinstance(x, Tensor)
            else [y.detach().to(device) for y in x] if isinstance(x, list) else x
            for x in arguments
        ]  # fmt: skip
        outputs = edge_readout.forward(*moved)
        gradients = edge_readout.backward(
            *(x.to(device) for x in upstream), *moved[:-1], all_of(query, factor), moved[-1]
        )
        return [*outputs, *gradients]

    clean = results()
    arguments[4] = [x.masked_fill(off[..., None], float("nan")) for x in query]
    arguments[5] = [x.masked_fill(off[..., None], float("nan")) for x in key]
    arguments[6] = factor.masked_fill(off, float("nan"))
    for one, other in zip(results(), clean, strict=True):
        assert torch.equal(one, other)


def test_gradients_nobody_asks_for(make, device):
    graph = make.graph()
    query, key = ([x.detach().to(device) for x in y] for y in random_history(graph, 3, 1, torch.float64))
    shared = [x.detach().to(device) for x in (graph.word_mask, graph.emotion_weight, graph.correlation)]
    mask = graph.emotion_mask.to(device)
    upstream = (torch.randn_like(shared[1]), torch.randn(2, 4, 4, dtype=torch.float64, device=device))
    gradients = edge_readout.backward(
        *upstream, *shared, mask, query, key, None, SCALE, False, [True, True, False, False, False], "ieee"
    )
    assert [x.shape for x in gradients] == [query[0].shape, key[0].shape]


def test_gradient_layout(make, device):
    """Gradients of a transposed [B, N, K, d] flatten back without a copy."""
    graph = make.graph()
    query, key = random_history(graph, 3, 1, torch.float64, transposed=True)
    shared = [x.detach().to(device) for x in (graph.word_mask, graph.emotion_weight, graph.correlation)]
    upstream = (torch.randn_like(shared[1]), torch.randn(2, 4, 4, dtype=torch.float64, device=device))
    gradients = edge_readout.backward(
        *upstream, *shared, None, [query[0].detach().to(device)], [key[0].detach().to(device)], None, SCALE, False,
        all_of(query, None), "ieee",
    )  # fmt: skip
    for gradient in gradients[:2]:
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, precision", [(torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee")]
)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_low_precision(make, depth, dtype, precision):
    """The error is within twice that of the reference in the same type, plus rounding; twice the same bits."""
    graph = make.graph(4, 40, 32, dtype=torch.float32)
    query, key = random_history(graph, 100, depth, torch.float32)
    query, key = ([x.detach().to("cuda", dtype) for x in y] for y in (query, key))
    factor = random_factor(graph, torch.float32).detach().cuda()
    weights = [graph.emotion_weight.detach().cuda(), graph.correlation.detach().cuda()]
    word_mask, emotion_mask = graph.word_mask.cuda(), graph.emotion_mask.cuda()
    upstream = [torch.randn(4, 32).cuda(), torch.randn(4, 32, 32).cuda()]
    scale = 100**-0.5

    def fused() -> list[Tensor]:
        arguments = (word_mask, *weights, emotion_mask, query, key, factor, scale, False, precision)
        outputs = edge_readout.forward(*arguments)
        return [
            *outputs,
            *edge_readout.backward(*upstream, *arguments[:-1], all_of(query, factor), precision),
        ]

    def plain(rounded: torch.dtype, exact: torch.dtype) -> list[Tensor]:
        leaves = [x.to(rounded).requires_grad_() for x in (*query, *key)]
        others = [x.to(exact).requires_grad_() for x in (factor, *weights)]
        dense = EmotionGraph(graph.word_weight.cuda(), word_mask, *others[1:], emotion_mask)
        outputs = reference.edge_readout(dense, leaves[:depth], leaves[depth:], others[0], scale, False)
        upstreams = [x.to(outputs[0].dtype) for x in upstream]
        return [*outputs, *torch.autograd.grad(outputs, [*leaves, *others], upstreams)]

    first, second = fused(), fused()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    rounding = 2e-3 if dtype is torch.float32 else torch.finfo(dtype).eps
    for ours, theirs, exact in zip(
        first, plain(dtype, torch.float32), plain(torch.float64, torch.float64), strict=True
    ):
        error, allowed = ((x.double() - exact).norm() for x in (ours, theirs))
        assert error <= 2 * allowed + rounding * exact.norm()
