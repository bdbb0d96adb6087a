"""The registered operators of the fused kernels: schema, shapes and strides without data, no hidden aliasing."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

# Autograd stands outside these operators, and none of them is meant to be differentiated itself.
UTILITIES = ("test_schema", "test_faketensor")
OPERATORS = torch.ops.ecore_kernels
SETTING = ("ieee", "triton")


def random(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device)


@pytest.mark.parametrize("words_only", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_graph_attention(make, device, words_only, strided, batched):
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
    shape = (2, 7, 2, 3) if strided else (2, 2, 7, 3)
    nodes = [random(*shape, device=device) for _ in range(5)]
    query, key, value, past_query, past_key = (x.transpose(1, 2) if strided else x for x in nodes)
    history = [past_query], [past_key], random(2, 2, 7, device=device)
    inputs = (query, key, value, word_weight, mask, weight, correlation, emotions, *history, 0.5, words_only)
    opcheck(OPERATORS.fused_graph_attention, (*inputs, *SETTING), test_utils=UTILITIES)
    output, *saved = OPERATORS.fused_graph_attention(*inputs, *SETTING)
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
        options = (0.5, words_only, wanted, wanted)
        opcheck(OPERATORS.fused_graph_attention_backward, (*inputs, *options, *SETTING), test_utils=UTILITIES)


@pytest.mark.parametrize("per_word", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
def test_edge_readout(make, device, per_word, layers):
    graph = make.graph(2, 4, 3, 2)
    fields = [x.detach().to(device) for x in (graph.word_mask, graph.emotion_weight, graph.correlation)]
    past = [[random(2, 2, 7, 3, device=device) for _ in range(layers)] for _ in range(2)]
    factor = random(2, 2, 7, device=device) if layers else None
    inputs = (*fields, None, *past, factor, 0.5, per_word)
    opcheck(OPERATORS.fused_edge_readout, (*inputs, *SETTING), test_utils=UTILITIES)
    gradients = [torch.randn_like(x) for x in OPERATORS.fused_edge_readout(*inputs, *SETTING)]
    for wanted in (True, False):
        arguments = (*gradients, *inputs, wanted, wanted, *SETTING)
        opcheck(OPERATORS.fused_edge_readout_backward, arguments, test_utils=UTILITIES)


@pytest.mark.parametrize("gated", [False, True])
def test_edge_attention(device, gated):
    query, key, value = (random(2, 3, 5, 4, device=device) for _ in range(3))
    edge = random(1, 3, 5, 5, device=device)
    neighbors = torch.rand(2, 1, 5, 5, device=device) > 0.3
    factor = random(2, 3, 5, device=device) if gated else None
    inputs = (query, key, value, edge, neighbors, factor)
    opcheck(OPERATORS.fused_edge_attention, (*inputs, 0.5, *SETTING), test_utils=UTILITIES)
    output, new_edge, normalizer = OPERATORS.fused_edge_attention(*inputs, 0.5, *SETTING)
    gradients = torch.randn_like(output), torch.randn_like(new_edge) if gated else None
    for wanted in (True, False):
        arguments = (*gradients, *inputs, output, normalizer, 0.5, wanted, *SETTING)
        opcheck(OPERATORS.fused_edge_attention_backward, arguments, test_utils=UTILITIES)
