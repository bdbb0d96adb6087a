"""Every operator in plain PyTorch on the dense graph: the oracle, on any device and in any float type.

Autograd differentiates these functions, twice if asked. Arithmetic is float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels.graph import EmotionGraph


def compute_type(*tensors: Tensor | None) -> torch.dtype:
    """The type that the given tensors are computed in: their common type, float32 at least."""
    kind = torch.float32
    for tensor in tensors:
        if tensor is not None:
            kind = torch.promote_types(kind, tensor.dtype)
    return kind


def neighbor_softmax(scores: Tensor, neighbors: Tensor) -> Tensor:
    """Softmax over the last dimension among neighbours; a row without neighbours gives 0 (Eq. 6)."""
    scores = scores.masked_fill(~neighbors, float("-inf"))
    # An all -inf row would give NaN, in the gradient too: it becomes a row of zeros first and is blanked afterwards.
    scores = scores.masked_fill(~neighbors.any(-1, keepdim=True), 0.0)
    return scores.softmax(-1).masked_fill(~neighbors, 0.0)


def edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor,
    neighbors: Tensor | None,
    gate: Tensor | None,
    edge_scale: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """One layer with its edges in memory, as the paper writes it (Eqs. 4 to 7)."""
    kind = compute_type(query, key, value, edge, gate, edge_scale)
    score = scale * (query.to(kind) @ key.to(kind).mT)
    attention_score = score * edge
    if neighbors is None:
        attention = attention_score.softmax(-1)
    else:
        attention = neighbor_softmax(attention_score, neighbors)
    output = attention @ value.to(kind)
    if gate is None:
        return output, None
    new_edge = gate[..., None] * edge_scale * (edge + attention_score)
    return output, new_edge if neighbors is None else new_edge.masked_fill(~neighbors, 0.0)


def graph_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: EmotionGraph,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
    scale: float,
    words_only: bool,
) -> Tensor:
    """Attention over the edges E0_ij r_i prod_m (1 + s^m_ij) that the history leaves (Eqs. 4 to 7 in closed form)."""
    edge, neighbors = graph.dense()
    rows = graph.shape[2] if words_only else query.shape[2]
    kind = compute_type(query, key, value, edge, row_factor, *history_query, *history_key)
    edge, neighbors = edge[:, :, :rows].to(kind), neighbors[:, :, :rows]
    for earlier_query, earlier_key in zip(history_query, history_key, strict=True):
        edge = edge * (1.0 + scale * (earlier_query[:, :, :rows].to(kind) @ earlier_key.to(kind).mT))
    if row_factor is not None:
        edge = edge * row_factor[:, :, :rows, None]
    score = scale * (query[:, :, :rows].to(kind) @ key.to(kind).mT)
    return neighbor_softmax(score * edge, neighbors) @ value.to(kind)


def edge_readout(
    graph: EmotionGraph,
    history_query: Sequence[Tensor],
    history_key: Sequence[Tensor],
    row_factor: Tensor | None,
    scale: float,
    per_word: bool,
) -> tuple[Tensor, Tensor]:
    """The emotion columns of the last edges, summed over resolutions (Eq. 8), without any N x N tensor."""
    batch, _, words, emotions = graph.shape
    kind = compute_type(graph.emotion_weight, graph.correlation, row_factor, *history_query, *history_key)
    to_words = graph.emotion_weight.to(kind)[:, None].expand(batch, words, emotions)
    edge = torch.cat([to_words, graph.correlation.to(kind).expand(batch, emotions, emotions)], dim=1)[:, None]
    for earlier_query, earlier_key in zip(history_query, history_key, strict=True):
        emotion_key = earlier_key[:, :, words:].to(kind)
        edge = edge * (1.0 + scale * (earlier_query.to(kind) @ emotion_key.mT))
    if row_factor is not None:
        edge = edge * row_factor[..., None]
    takes_part = graph.participants()
    node = torch.arange(words + emotions, device=takes_part.device)
    hears = takes_part[..., :, None] & takes_part[..., None, words:] & (node[:, None] != node[words:])
    edge = torch.where(hears, edge, 0.0).sum(1)
    to_word = edge[:, :words]
    return to_word if per_word else to_word.sum(1), edge[:, words:]


def otsu(values: Tensor, max_relevant: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Otsu's split of every row into relevant and other emotions (Eqs. 14, 20, 21)."""
    emotions = values.shape[1]
    finite = values.isfinite().all(1)
    if values.device.type == "cpu" and not bool(finite.all()):
        raise ValueError(f"otsu: values: row {int((~finite).nonzero()[0])} is not finite")
    ordered = values.sort(dim=1, descending=True).values
    most = emotions - 1 if max_relevant is None else min(max_relevant, emotions - 1)
    threshold = ordered[:, -1]
    if most > 0:
        exact = ordered.double()
        if values.dtype is torch.float64:
            exact = exact * _range_factor(ordered[:, 0], threshold)[:, None]
        sums = exact.cumsum(1)
        size = torch.arange(1, most + 1, device=values.device, dtype=torch.float64)
        between = (sums[:, :most] - size * (sums[:, -1:] / emotions)).square() / (size * (emotions - size))
        best = between.argmax(1, keepdim=True)  # the first of equal ones: the smaller split
        threshold = torch.where(ordered[:, 0] == threshold, threshold, ordered.gather(1, best)[:, 0])
    threshold = torch.where(finite, threshold, float("nan"))
    mask = values >= threshold[:, None]  # nothing is >= NaN: a row that is not finite gets an empty mask
    return mask, mask.sum(1), threshold


def _range_factor(first: Tensor, last: Tensor) -> Tensor:
    """Powers of two that bring the largest magnitudes of sorted rows near 1: sums and squares then stay in range.

    Args:
        first, last: [B] float64, the largest and the smallest value of every row.
    """
    exponent = torch.maximum(first.abs(), last.abs()).frexp().exponent.long()
    # By their bits: a power function need not be exact. All are normal numbers, which flushing to zero leaves alone.
    return ((1023 + (1 - exponent).clamp(-1022, 1023)) << 52).view(torch.float64)
