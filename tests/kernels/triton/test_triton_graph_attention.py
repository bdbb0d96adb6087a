"""graph_attention's kernels themselves: what tests of the public operator cannot see or would not happen to meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ecore_kernels import EmotionGraph, graph_attention, reference
from ecore_kernels.operators.history import row_factor
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.graph_attention import launcher
from tests.kernels.triton.fused import Fused

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")

kernels = Fused("graph_attention")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that the error's norm is within tolerance of the expected tensor's."""
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm() + 1e-30, f"{float(error / expected.norm()):.1e}"


def compare(
    graph: EmotionGraph,
    tensors: tuple[list[Tensor], list[Tensor], Tensor],
    device: torch.device,
    *,
    factor: Tensor | None,
    words_only: bool = False,
    scale: float = 0.3,
    precision: str = "ieee",
) -> None:
    """Outputs and all gradients of the launchers against the float64 reference."""
    (query, *past_query), (key, *past_key), value = tensors
    dtype = query.dtype

    def double(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_()

    exact = EmotionGraph(
        graph.word_weight.double(),
        graph.word_mask,
        double(graph.emotion_weight),
        double(graph.correlation),
        graph.emotion_mask,
    )
    leaves = [double(x) for x in (query, key, value, *past_query, *past_key)]
    depth = len(past_query)
    exact_factor = double(factor)
    expected = reference.graph_attention(
        *leaves[:2],
        leaves[2],
        exact,
        leaves[3 : 3 + depth],
        leaves[3 + depth :],
        exact_factor,
        scale,
        words_only,
    )
    upstream = torch.randn_like(expected).to(dtype)
    weights = [*([] if factor is None else [exact_factor]), exact.emotion_weight, exact.correlation]
    gradients = torch.autograd.grad(expected, [*leaves, *weights], upstream.double(), allow_unused=True)

    def here(x):
        return x.detach().to(device) if isinstance(x, Tensor) else x

    nodes = [here(x) for x in (query, key, value)]
    past = [[here(x) for x in past_query], [here(x) for x in past_key]]
    mask, moved = here(graph.word_mask), here(factor)
    weight, correlation, emotion_mask = map(
        here, (graph.emotion_weight, graph.correlation, graph.emotion_mask)
    )
    output, *saved = kernels.forward(
        *nodes, here(graph.word_weight), mask, weight, correlation, emotion_mask, *past, moved, scale, words_only,
        precision,
    )  # fmt: skip
    actual = kernels.backward(
        here(upstream), *nodes, mask, correlation, emotion_mask, *past, moved, output, *saved, scale, words_only,
        [True] * (3 + 2 * depth) + [factor is not None, True, True], precision,
    )  # fmt: skip
    assert output.dtype == dtype
    assert_close(output.cpu(), expected, TOLERANCE[dtype])
    for got, wanted, leaf in zip(actual, gradients, [*leaves, *weights], strict=True):
        assert_close(got.cpu(), torch.zeros_like(leaf) if wanted is None else wanted, TOLERANCE[dtype])


def tensors_for(make, graph, dim, value_dim, depth, dtype):
    """Queries and keys, this layer's first, values, and the history's row factor."""
    updates = [make.update(graph, dim) for _ in range(depth + 1)]
    queries = [u.query.detach().to(dtype) for u in updates]
    keys = [u.key.detach().to(dtype) for u in updates]
    factor = row_factor(updates[1:])
    number = torch.float64 if dtype is torch.float64 else torch.float32
    factor = None if factor is None else factor.detach().to(number)
    return (queries, keys, make.value(graph, value_dim).detach().to(dtype)), factor


@pytest.mark.parametrize("words_only", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_against_the_reference(make, device, depth, words_only, dtype):
    number = torch.float64 if dtype is torch.float64 else torch.float32
    graph = make.graph(2, 19, 5, 1, dtype=number, correlation="batched" if depth % 2 else "shared")
    tensors, factor = tensors_for(make, graph, 7, 5, depth, dtype)
    compare(graph, tensors, device, factor=factor, words_only=words_only)


@pytest.mark.parametrize("words, emotions", [(40, 33), (3, 70), (70, 3), (33, 1), (1, 33)])
@pytest.mark.parametrize("words_only", [False, True])
def test_more_than_one_block_of_each_kind(make, device, words, emotions, words_only):
    graph = make.graph(1, words, emotions, 1, masked=False)
    tensors, factor = tensors_for(make, graph, 3, 3, 1, torch.float64)
    compare(graph, tensors, device, factor=factor, words_only=words_only)


@pytest.mark.parametrize("chunk", [16, 32])
def test_nodes_are_put_in_order_chunk_by_chunk(make, device, monkeypatch, chunk):
    monkeypatch.setattr(launcher, "CHUNK", chunk)
    graph = make.graph(1, 50, 35, 2)
    tensors, factor = tensors_for(make, graph, 3, 3, 1, torch.float64)
    compare(graph, tensors, device, factor=factor)


@pytest.mark.parametrize("constants", [{"BLOCK": 16, "STEP": 64}, {"BLOCK": 64, "STEP": 16}, {"PIECE": 16}])
@pytest.mark.parametrize("words_only", [False, True])
def test_any_configuration_gives_the_same(make, device, monkeypatch, constants, words_only):
    """Blocks of receivers and of senders that do not match, and rows in several pieces."""
    original = launch.configuration

    def other(*arguments):
        chosen, options = original(*arguments)
        return chosen | {"BLOCK": 16, "STEP": 16} | constants, options

    monkeypatch.setattr(launch, "configuration", other)
    graph = make.graph(1, 70, 21, 1)
    tensors, factor = tensors_for(make, graph, 40, 20, 1, torch.float64)
    compare(graph, tensors, device, factor=factor, words_only=words_only)


@pytest.mark.parametrize("reload", [False, True])
def test_loading_again_changes_nothing(make, device, monkeypatch, reload):
    original = launch.configuration

    def other(kernel, *arguments):
        chosen, options = original(kernel, *arguments)
        return chosen | ({"RELOAD": reload} if kernel.endswith("backward") else {}), options

    monkeypatch.setattr(launch, "configuration", other)
    graph = make.graph(1, 20, 5, 1)
    tensors, factor = tensors_for(make, graph, 3, 3, 2, torch.float64)
    compare(graph, tensors, device, factor=factor)


def test_what_takes_no_part_is_never_read(make, device):
    """NaN in words that are out of a resolution reaches nothing, and their gradients are 0."""
    graph = make.graph(2, 9, 4, 2)
    out = ~graph.participants()
    (queries, keys, value), factor = tensors_for(make, graph, 3, 3, 1, torch.float64)
    clean = [*queries, *keys, value]
    spoilt = [x.masked_fill(out[..., None], float("nan")) for x in clean]

    def run(tensors):
        query, past_query, key, past_key, value = (x.to(device) for x in tensors)
        word_weight, mask, weight, correlation, emotions = (
            x.detach().to(device)
            for x in (
                graph.word_weight,
                graph.word_mask,
                graph.emotion_weight,
                graph.correlation,
                graph.emotion_mask,
            )
        )
        past = [past_query], [past_key], factor.to(device)
        output, *saved = kernels.forward(
            query, key, value, word_weight, mask, weight, correlation, emotions, *past, 0.3, False, "ieee"
        )
        return [output, *kernels.backward(
            torch.ones_like(output), query, key, value, mask, correlation, emotions, *past, output, *saved,
            0.3, False, [True] * 8, "ieee",
        )]  # fmt: skip

    results = run(spoilt)
    for one, other in zip(results, run(clean), strict=True):
        assert torch.equal(one, other)
    for gradient in results[:6]:
        assert not gradient.cpu()[out].any()


def test_the_layout_follows_the_inputs(make, device):
    """Heads that lie side by side, as a projection leaves them, give results that flatten without a copy."""
    graph = make.graph(2, 6, 3, 2, masked=False)
    nodes = [torch.randn(2, 9, 2, 4, device=device).transpose(1, 2) for _ in range(3)]
    moved = [
        x.detach().to(device, torch.float32)
        for x in (graph.word_weight, graph.emotion_weight, graph.correlation)
    ]
    mask = graph.word_mask.to(device)
    output, *saved = kernels.forward(
        *nodes, moved[0], mask, *moved[1:], None, [], [], None, 0.3, False, "ieee"
    )
    gradients = kernels.backward(
        torch.ones_like(output), *nodes, mask, moved[2], None, [], [], None, output, *saved, 0.3, False,
        [True, True, True, False, False, False], "ieee",
    )  # fmt: skip
    for tensor in (output, *gradients):
        assert tensor.transpose(1, 2).is_contiguous()


def test_words_that_need_a_gradient_are_refused(make):
    graph = make.graph(dtype=torch.float32)
    graph.word_weight.requires_grad_()
    x = torch.randn(2, 3, 9, 4)
    with pytest.raises(RuntimeError, match="gives no gradient to word_weight"):
        graph_attention(x, x, x, graph, backend="triton")
