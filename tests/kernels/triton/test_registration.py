"""The registered operators of the fused kernels: schema, shapes and strides without data, no hidden aliasing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_leaves, tree_map_only

# Autograd stands outside these operators, and none of them is meant to be differentiated itself.
UTILITIES = ("test_schema", "test_faketensor")
OPERATORS = torch.ops.ecore_kernels
SETTING = ("ieee", "triton")
LAYOUTS = ["heads apart", "heads side by side", "shared by the batch"]


def check(operator, arguments):
    """Return the results; opcheck, and what that leaves out: shapes without data lie in memory as the results do."""
    opcheck(operator, arguments, test_utils=UTILITIES)
    mode = FakeTensorMode()
    without_data = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
    with mode:
        shapes = tree_leaves(operator(*without_data))
    results = operator(*arguments)
    for real, fake in zip(tree_leaves(results), shapes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    return results


def random(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device)


def laid_out(layout: str, shape: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
    """A random [B, K, N, d]: how it lies in memory decides how results do, with data and without."""
    batch, resolutions, nodes, dim = shape
    if layout == "heads side by side":
        return random(batch, nodes, resolutions, dim, device=device).transpose(1, 2)
    if layout == "shared by the batch":
        return random(1, nodes, resolutions, dim, device=device).transpose(1, 2).expand(shape)
    return random(*shape, device=device)


@pytest.mark.parametrize("words_only, batched", [(False, True), (True, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_attention(make, device, words_only, layout, batched):
    graph = make.graph(2, 4, 3, 2, correlation="batched" if batched else "shared")
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
    correlation = correlation.mT  # results are laid out in their own way
    query, key, value, past_query, past_key = (laid_out(layout, (2, 2, 7, 3), device) for _ in range(5))
    history = [past_query], [past_key], random(2, 2, 7, device=device)
    inputs = (query, key, value, word_weight, mask, weight, correlation, emotions, *history, 0.5, words_only)
    output, *saved = check(OPERATORS.fused_graph_attention, (*inputs, *SETTING))
    for wanted in (True, False):
        inputs = (
            torch.randn_like(output),
            query,
            key,
            value,
            mask,
            correlation,
            emotions,
            *history,
            output,
            *saved,
        )
        needs = [True] * (3 + 2 * len(history[0])) + [history[2] is not None, wanted, wanted]
        options = (0.5, words_only, needs)
        check(OPERATORS.fused_graph_attention_backward, (*inputs, *options, *SETTING))


@pytest.mark.parametrize("per_word", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_edge_readout(make, device, per_word, layers, layout):
    graph = make.graph(2, 4, 3, 2)
    fields = [x.detach().to(device) for x in (graph.word_mask, graph.emotion_weight, graph.correlation)]
    past = [[laid_out(layout, (2, 2, 7, 3), device) for _ in range(layers)] for _ in range(2)]
    if layers:
        past[1][0] = past[1][0].contiguous()  # laid out by itself
    factor = random(2, 2, 7, device=device) if layers else None
    inputs = (*fields, None, *past, factor, 0.5, per_word)
    gradients = [torch.randn_like(x) for x in check(OPERATORS.fused_edge_readout, (*inputs, *SETTING))]
    for wanted in (True, False):
        needs = [True] * (2 * layers) + [factor is not None, wanted, wanted]
        arguments = (*gradients, *inputs, needs, *SETTING)
        check(OPERATORS.fused_edge_readout_backward, arguments)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_edge_attention(device, gated, layout):
    query, key, value = (laid_out(layout, (2, 3, 5, 4), device) for _ in range(3))
    edge = random(1, 3, 5, 5, device=device)
    neighbors = torch.rand(2, 1, 5, 5, device=device) > 0.3
    factor = random(2, 3, 5, device=device) if gated else None
    inputs = (query, key, value, edge, neighbors, None, factor, None, None, None)
    numbers = (0.5, None, 0.0, False)
    output, new_edge, _, saved = check(OPERATORS.fused_edge_attention, (*inputs, *numbers, False, *SETTING))
    gradients = torch.randn_like(output), torch.randn_like(new_edge) if gated else None, None
    for wanted in (True, False):
        needs = [True, True, True, wanted, False, gated, False, False]
        arguments = (*gradients, *inputs, output, saved, *numbers, needs, *SETTING)
        check(OPERATORS.fused_edge_attention_backward, arguments)


@pytest.mark.parametrize("all_pairs", [False, True])
def test_edge_attention_with_all_options(device, all_pairs):
    query, key, value = (
        laid_out(LAYOUTS[1], (2, 4, 5, 4), device),
        *(random(2, 2, 6, 4, device=device) for _ in "kv"),
    )
    edge, bias = random(1, 4, 5, 6, device=device), random(2, 1, 5, 6, device=device)
    neighbors = torch.rand(2, 1, 5, 6, device=device) > 0.3
    factor, gate = random(2, 4, 5, device=device), random(2, 4, 6, device=device)
    seed = torch.tensor(7, device=device)
    inputs = (query, key, value, edge, neighbors, bias, factor, gate, random(device=device), seed)
    numbers = (0.5, (-1.0, 1.0), 0.3, all_pairs)
    results = check(OPERATORS.fused_edge_attention, (*inputs, *numbers, True, *SETTING))
    gradients = [torch.randn_like(x) for x in results[:3]]
    arguments = (*gradients, *inputs, results[0], results[3], *numbers, [True] * 8, *SETTING)
    check(OPERATORS.fused_edge_attention_backward, arguments)
