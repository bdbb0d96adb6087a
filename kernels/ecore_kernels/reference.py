"""Every operator in plain PyTorch on the dense graph: the oracle, on any device and in any float type.

Autograd can differentiate these functions, twice as well. Arithmetic is float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ecore_kernels.copying import mixed
from ecore_kernels.graph import EmotionGraph
from ecore_kernels.label_smoothing import goal_of
from ecore_kernels.philox import keep_scale, kept, philox, threshold


def compute_type(*tensors: Tensor | None) -> torch.dtype:
    """The type for computing with these tensors: their common type, float32 at least."""
    kind = torch.float32
    for tensor in tensors:
        if tensor is not None:
            kind = torch.promote_types(kind, tensor.dtype)
    return kind


def select(tensor: Tensor, where: Tensor) -> Tensor:
    """``tensor``, 0 where it does not count: multiplied by 0, NaN and infinity would stay, in the gradient too."""
    return torch.where(where, tensor, 0.0)


def attend(
    scores: Tensor, neighbors: Tensor, hears: Tensor, value: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Softmax over the last dimension among neighbours, times values (Eqs. 6 and 4).

    Args:
        scores: [..., N, N], numbers in rows without neighbours.
        neighbors: bool, broadcasts to the scores.
        hears: [..., N, 1] bool, the row has neighbours; a row without gives 0.
        value: [..., N, dv]. A value that is not finite makes NaN of the rows that attend to it, and changes no other
            row.
        kept: factor on every weight, 0 for those that dropout drops; None for 1.
    """
    attention = among_neighbors(scores, neighbors, hears).softmax(-1)
    spoilt = (0.0 * value.detach()).sum(-1).isnan().to(value.dtype)  # [..., N]
    poison = (attention.detach() * spoilt[..., None, :]).sum(-1, keepdim=True)  # [..., N, 1]
    poison = torch.where(poison == 0, poison, float("nan"))
    if kept is not None:
        attention = attention * kept
    return select(attention @ value.nan_to_num(0.0, 0.0, 0.0) + poison, hears)


def among_neighbors(scores: Tensor, neighbors: Tensor, hears: Tensor) -> Tensor:
    """Scores with -inf off the graph, for a softmax."""
    # A row of nothing but -inf would give NaN, in the gradient too: a row without neighbours keeps its scores here.
    return torch.where(neighbors.logical_not() & hears, float("-inf"), scores)


def kept_weights(seed: Tensor, dropout: float, shape: Sequence[int], kind: torch.dtype) -> Tensor:
    """Factors of attention weights under dropout: 1 / (1 - p) where a weight is kept, else 0.

    Args:
        seed: int64 of one element.
        dropout: p, from 0 to 1.
        shape: [B, H, Nq, Nk].
    """
    batch, heads, receivers, senders = shape
    sender, receiver, pair = (
        torch.arange(size, device=seed.device) for size in (senders, receivers, batch * heads)
    )
    word = philox(seed, sender, receiver[:, None], pair.view(batch, heads, 1, 1), 0)  # [B, H, Nq, Nk]
    return (word >= threshold(dropout)).to(kind) * (1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0)


def edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    neighbors: Tensor | None,
    gate: Tensor | None,
    edge_scale: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
    edge_bias: Tensor | None = None,
    sender_gate: Tensor | None = None,
    seed: Tensor | None = None,
    clamp: Sequence[float] | None = None,
    dropout: float = 0.0,
    all_pairs: bool = False,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One layer with its edges in memory, as the paper writes it (Eqs. 4 to 7), and what other models add to it.

    ``operators.edge_attention`` has the formulas.

    Returns:
        output [B, H, Nq, dv], the updated edges [B, H, Nq, Nk], the logarithm of the softmax's sum [B, H, Nq]; None for
        edges without an update, and for a logarithm that is not wanted.
    """
    kind = compute_type(query, key, value, edge, bias, gate, edge_scale, edge_bias, sender_gate)
    query, key, value = query.to(kind), key.to(kind), value.to(kind)
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    edge = None if edge is None else edge.to(kind)
    bias = None if bias is None else bias.to(kind)
    factor = None if gate is None else gate.to(kind)[..., None]  # [B, H, Nq, 1]
    sent = None if sender_gate is None else sender_gate.to(kind)[..., None]  # [B, H, Nk, 1]
    if neighbors is not None:
        # On a CPU counting them is several times faster than any().
        hears, heard = (neighbors.sum(dim, dtype=torch.int32)[..., None] > 0 for dim in (-1, -2))
        bias = None if bias is None else select(bias, neighbors)
        if not all_pairs:
            query, key = select(query, hears), select(key, heard)
            edge = None if edge is None else select(edge, neighbors)
            factor = None if factor is None else select(factor, hears)
            sent = None if sent is None else select(sent, heard)
    score = scale * (query @ key.mT)  # [B, H, Nq, Nk]
    if clamp is not None:
        score = score.clamp(*clamp)
    weighted = score if edge is None else score * edge
    if sent is not None:
        weighted = weighted * sent.mT
    logit = weighted if bias is None else weighted + bias
    kept = None if seed is None else kept_weights(seed, dropout, logit.shape, kind)
    if neighbors is None:
        attention = logit.softmax(-1)
        output = (attention if kept is None else attention * kept) @ value
        lse = logit.logsumexp(-1) if with_lse else None
    else:
        output = attend(logit, neighbors, hears, value, kept)
        lse = among_neighbors(logit, neighbors, hears).logsumexp(-1) if with_lse else None
        lse = None if lse is None else torch.where(hears[..., 0], lse, float("-inf"))
    if gate is None and edge_scale is None and edge_bias is None:
        return output, None, lse
    new_edge = (1.0 if edge is None else edge) + weighted
    if edge_scale is not None:
        factor = edge_scale if factor is None else factor * edge_scale
    if factor is not None:
        new_edge = factor * new_edge
    if edge_bias is not None:
        new_edge = new_edge + edge_bias
    if neighbors is not None and not all_pairs:
        new_edge = select(new_edge, neighbors)
    return output, new_edge, lse


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
    takes_part = graph.participants()[..., None]
    hears = takes_part[:, :, :rows]

    def score(query: Tensor, key: Tensor) -> Tensor:
        query, key = select(query[:, :, :rows].to(kind), hears), select(key.to(kind), takes_part)
        return scale * (query @ key.mT)

    edge, neighbors = edge[:, :, :rows].to(kind), neighbors[:, :, :rows]
    for earlier_query, earlier_key in zip(history_query, history_key, strict=True):
        edge = edge * (1.0 + score(earlier_query, earlier_key))
    if row_factor is not None:
        edge = edge * select(row_factor[:, :, :rows, None], hears)
    return attend(score(query, key) * edge, neighbors, hears, value.to(kind))


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
    takes_part = graph.participants()[..., None]  # [B, K, N, 1]
    heard = takes_part[:, :, words:]
    sender = torch.eye(emotions, dtype=torch.bool, device=heard.device).logical_not()
    # Emotions take part in all resolutions or in none.
    weight = select(graph.emotion_weight.to(kind), heard[:, 0, :, 0])[:, None].expand(batch, words, emotions)
    correlation = select(graph.correlation.to(kind), sender & heard[:, 0] & heard[:, 0].mT)
    edge = torch.cat([weight, correlation], dim=1)[:, None]
    for earlier_query, earlier_key in zip(history_query, history_key, strict=True):
        earlier_query = select(earlier_query.to(kind), takes_part)
        emotion_key = select(earlier_key[:, :, words:].to(kind), heard)
        edge = edge * (1.0 + scale * (earlier_query @ emotion_key.mT))
    if row_factor is not None:
        edge = edge * select(row_factor[..., None], takes_part)
    neighbors = takes_part & torch.cat([heard.mT.expand(-1, -1, words, -1), heard.mT & sender], dim=2)
    edge = select(edge, neighbors).sum(1)  # off the graph a score may overflow
    to_word = edge[:, :words]
    return to_word if per_word else to_word.sum(1), edge[:, words:]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    smoothing_classes: int | None,
    ignore_index: int,
    mean: bool,
    copies: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and unsmoothed losses [T] of a linear layer's outputs [T, V], all of which are in memory.

    Args:
        copies: gate, scores, classes and slots of :func:`ecore_kernels.copying.mixed`.
    """
    kind = compute_type(hidden, weight, bias)
    logits = F.linear(hidden.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
    log_probability = logits.log_softmax(1) if copies is None else mixed(logits, *copies)
    goal = goal_of(len(weight), label_smoothing, smoothing_classes, ignore_index)
    counted = target != ignore_index
    nll = -log_probability.gather(1, torch.where(counted, target, 0)[:, None])[:, 0]
    loss = goal.extra * nll
    if goal.base:
        spread = -log_probability
        if goal.hole >= 0:
            spread = torch.cat([spread[:, : goal.hole], spread[:, goal.hole + 1 :]], dim=1)
        loss = loss + goal.base * spread.sum(1)
    total = select(loss, counted).sum()
    return total / counted.sum() if mean else total, select(nll, counted).detach()


def dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Dropout of x [rows, D] by the mask of :func:`ecore_kernels.philox.kept`; none without a seed."""
    return x if seed is None else select(x * keep_scale(p), kept(seed, x.shape[0], x.shape[1], p, x.device))


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of residual + dropout(x), and that sum, both [rows, D]."""
    kind = compute_type(x, residual, weight, bias)
    total = residual.to(kind) + dropped(x.to(kind), seed, p)
    scale, offset = (None if y is None else y.to(kind) for y in (weight, bias))
    return F.layer_norm(total, total.shape[1:], scale, offset, eps), total


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
        best = between.argmax(1, keepdim=True)  # of equal scores the first, which is the smaller split
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
    # Built from bits, because a power function need not be exact. All are normal numbers, so flushing to zero does not
    # change them.
    return ((1023 + (1 - exponent).clamp(-1022, 1023)) << 52).view(torch.float64)
