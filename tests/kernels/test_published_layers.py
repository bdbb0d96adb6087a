"""Attention cores of published layers, written out from their formulas, against the operator: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ecore_kernels import edge_attention

pytestmark = pytest.mark.usefixtures("backend")

BATCH, HEADS, NODES, DIM = 2, 3, 7, 4


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def nodes(count: int = NODES, heads: int = HEADS, dim: int = DIM) -> Tensor:
    return leaf(BATCH, heads, count, dim)


def pairs(*shape: int) -> Tensor:
    """A mask that leaves every receiver somebody to hear."""
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    return mask


def same(assert_same, actual, expected, leaves) -> None:
    assert_same(actual, expected, leaves, 1e-9)


def test_the_e_core_releases_layer(assert_same):
    """Scores are multiplied by edges and a gate of the sender; all edges are updated by an affine map."""
    query, key, value = nodes(), nodes(), nodes()
    edge, sent = leaf(BATCH, HEADS, NODES, NODES), leaf(DIM)
    weight, bias = leaf(), leaf()
    heard = pairs(BATCH, 1, NODES, NODES)

    gate = value @ sent  # [B, H, Nk]
    scores = query @ key.mT * (gate[:, :, None, :] * edge)
    output = torch.where(heard, scores, float("-inf")).softmax(-1) @ value
    expected = output, weight * (edge + scores) + bias

    actual = edge_attention(
        query,
        key,
        value,
        edge,
        heard,
        sender_gate=value @ sent,
        edge_scale=weight,
        edge_bias=bias,
        update="all",
    )
    same(assert_same, actual, expected, [query, key, value, edge, sent, weight, bias])


def test_the_e_core_releases_concept_graph(assert_same):
    """Words hear words and concepts; what is masked keeps a score of 0."""
    words, concepts = 5, 6
    query = leaf(BATCH, 1, words, DIM)
    key, value = leaf(BATCH, 1, words + concepts, DIM), leaf(BATCH, 1, words + concepts, DIM)
    masked = torch.rand(BATCH, 1, words, words + concepts) > 0.6

    expected = (query @ key.mT).masked_fill(masked, 1e-24).softmax(-1) @ value

    actual, new_edge = edge_attention(query, key, value, masked.logical_not())
    assert new_edge is None
    same(assert_same, [actual], [expected], [query, key, value])


@pytest.mark.parametrize("form", ["add", "mul"])
def test_biased_mha(assert_same, form):
    """DGL's BiasedMHA: a bias [B, N, N, H] is added to scaled scores, or multiplies them."""
    query, key, value, bias = nodes(), nodes(), nodes(), leaf(BATCH, NODES, NODES, HEADS)
    masked = pairs(BATCH, NODES, NODES).logical_not()

    scores = (query * DIM**-0.5) @ key.mT
    of_heads = bias.permute(0, 3, 1, 2)
    scores = scores + of_heads if form == "add" else scores * of_heads
    expected = scores.masked_fill(masked[:, None], float("-inf")).softmax(-1) @ value

    given = {"bias": bias.permute(0, 3, 1, 2)} if form == "add" else {"edge": bias.permute(0, 3, 1, 2)}
    actual, _ = edge_attention(query, key, value, neighbors=~masked[:, None], scale=None, **given)
    same(assert_same, [actual], [expected], [query, key, value, bias])


def test_egt(assert_same):
    """EGT without its gates: clamped scores and edges are added up, attended over, and go to the edge channel."""
    query, key, value, edge = (
        (2 * nodes()).detach().requires_grad_(),
        nodes(),
        nodes(),
        leaf(BATCH, HEADS, NODES, NODES),
    )
    low, high = -0.8, 0.9

    scores = (DIM**-0.5 * query @ key.mT).clamp(low, high) + edge
    expected = scores.softmax(-1) @ value, scores

    output, clamped = edge_attention(
        query, key, value, bias=edge, scale=None, clamp=(low, high), edge_bias=-1.0, update="all"
    )
    same(assert_same, [output, clamped + edge], expected, [query, key, value, edge])


def test_transformer_conv_with_edge_vectors(assert_same):
    """PyG's TransformerConv on a dense graph: edge vectors are added to keys and to values."""
    query, key, value = nodes(), nodes(), nodes()
    edges = leaf(BATCH, HEADS, NODES, NODES, DIM)
    heard = pairs(BATCH, 1, NODES, NODES)

    scores = (query[:, :, :, None] * (key[:, :, None] + edges)).sum(-1) * DIM**-0.5
    attention = torch.where(heard, scores, float("-inf")).softmax(-1)
    expected = (attention[..., None] * (value[:, :, None] + edges)).sum(-2)

    bias = (query[:, :, :, None] * edges).sum(-1) * DIM**-0.5
    output, _, lse = edge_attention(
        query, key, value, neighbors=heard, bias=bias, scale=None, return_lse=True
    )
    weights = torch.where(heard, (DIM**-0.5 * query @ key.mT + bias - lse[..., None]).exp(), 0.0)
    actual = output + (weights[..., None] * edges).sum(-2)
    same(assert_same, [actual], [expected], [query, key, value, edges])


def test_relational_attention(assert_same):
    """The Relational Transformer without edge vectors on its query: they are added to keys alone."""
    query, key, value = nodes(), nodes(), nodes()
    edges, weight = leaf(BATCH, NODES, NODES, 5), leaf(5, HEADS * DIM)

    of_keys = (edges @ weight).unflatten(-1, (HEADS, DIM)).permute(0, 3, 1, 2, 4)
    scores = (query[:, :, :, None] * (key[:, :, None] + of_keys)).sum(-1) * DIM**-0.5
    expected = scores.softmax(-1) @ value

    bias = torch.einsum("bhid,bijhd->bhij", query, (edges @ weight).unflatten(-1, (HEADS, DIM)))
    actual, _ = edge_attention(query, key, value, bias=DIM**-0.5 * bias, scale=None)
    same(assert_same, [actual], [expected], [query, key, value, edges, weight])
