"""Layers of attention with edges: the paper's, one like ``torch.nn.MultiheadAttention``, and a transformer layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore_kernels.module import MultiResolutionEdgeAttention
from ecore_kernels.operators.edge_attention import edge_attention
from ecore_kernels.refusals import expect_tensors

__all__ = [
    "EdgeAttention",
    "EdgeTransformerLayer",
    "MultiResolutionEdgeAttention",
    "biased_mha_weights",
    "egt_weights",
]


class EdgeAttention(nn.Module):
    """Multi-head attention with edges, in the shapes and with the weights of ``torch.nn.MultiheadAttention``.

    Its state_dict has the keys of that module (with one width for queries, keys and values).

    Args:
        embed_dim: width D of the nodes; each of the H heads is D / H wide.
        num_heads: H.
        dropout: of the attention weights, in training.
        bias: whether the projections have biases.
        batch_first: whether tensors are [B, N, D]; else [N, B, D], as in torch.
        scale: factor on the scores; None means 1 / sqrt(D / H).
        clamp: (low, high) of the scaled scores, before edges; None for none.

    Raises:
        ValueError: ``embed_dim`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        scale: float | None = None,
        clamp: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"EdgeAttention: embed_dim: expected a positive multiple of the heads, got {embed_dim} and "
                f"{num_heads} heads"
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.dropout, self.batch_first, self.clamp = dropout, batch_first, clamp
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, H, N, d] of [B, N, D]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values [B, H, N, d] of nodes [B, N, D]."""
        if query is key and key is value:
            together = F.linear(query, self.in_proj_weight, self.in_proj_bias)  # [B, N, 3 * D]
            return [self._heads(x) for x in together.chunk(3, -1)]
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        given = zip((query, key, value), weights, biases, strict=True)
        return [self._heads(F.linear(x, weight, bias)) for x, weight, bias in given]

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        edge: Tensor | None = None,
        bias: Tensor | None = None,
        neighbors: Tensor | None = None,
        gate: Tensor | None = None,
        edge_scale: Tensor | float | None = None,
        edge_bias: Tensor | float | None = None,
        sender_gate: Tensor | None = None,
        update: str = "neighbors",
        seed: Tensor | int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. A receiver without neighbours gets the bias of the output's projection, where torch gives NaN.

        Args:
            query: [Nq, B, D], or [B, Nq, D] with ``batch_first``.
            key, value: [Nk, B, D], or [B, Nk, D]; None for ``query``, and for ``key``.
            key_padding_mask: [B, Nk]; bool: True for keys to leave out; floats are added to the scores.
            attn_mask: [Nq, Nk] or [B * H, Nq, Nk]; bool: True for pairs to leave out; floats are added to the scores.
            edge, bias, neighbors, gate, edge_scale, edge_bias, sender_gate, update, seed: as
                :func:`ecore_kernels.edge_attention` takes them, with H heads.

        Returns:
            output: in the shape of ``query``.
            new_edge: [B, H, Nq, Nk]; None without an update.

        Raises:
            ValueError: a shape or a type that does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, x in (("query", query), ("key", key), ("value", value)):
            expect_tensors("EdgeAttention", **{name: x})
            if x.dim() != 3 or x.shape[2] != self.embed_dim:
                shape = "[B, N, D]" if self.batch_first else "[N, B, D]"
                raise ValueError(
                    f"EdgeAttention: {name}: expected {shape} with D = {self.embed_dim}, got {list(x.shape)}"
                )
        if not self.batch_first:
            same = query is key and key is value
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
            if same:
                key = value = query
        batch, receivers, senders = query.shape[0], query.shape[1], key.shape[1]
        masks = (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask))
        for name, mask in masks:
            if mask is None:
                continue
            expect_tensors("EdgeAttention", **{name: mask})
            if name == "key_padding_mask" and mask.shape == (batch, senders):
                of_pairs = mask[:, None, None]
            elif name == "attn_mask" and mask.shape == (receivers, senders):
                of_pairs = mask
            elif name == "attn_mask" and mask.shape == (batch * self.num_heads, receivers, senders):
                of_pairs = mask.unflatten(0, (batch, self.num_heads))
            else:
                raise ValueError(
                    f"EdgeAttention: {name}: it does not fit {batch} batches of {receivers} receivers and {senders} "
                    f"senders with {self.num_heads} heads, got {list(mask.shape)}"
                )
            if mask.dtype is torch.bool:
                neighbors = ~of_pairs if neighbors is None else neighbors & ~of_pairs
            else:
                bias = of_pairs if bias is None else bias + of_pairs
        queries, keys, values = self._projected(query, key, value)
        output, new_edge = edge_attention(
            queries,
            keys,
            values,
            edge,
            neighbors,
            bias=bias,
            gate=gate,
            edge_scale=edge_scale,
            edge_bias=edge_bias,
            sender_gate=sender_gate,
            update=update,
            scale=self.scale,
            clamp=self.clamp,
            dropout=self.dropout if self.training else 0.0,
            seed=seed,
        )[:2]
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        return output if self.batch_first else output.transpose(0, 1), new_edge

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def _feed_forward(dim: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ELU(), nn.Linear(hidden, dim), nn.Dropout(dropout)
    )


class EdgeTransformerLayer(nn.Module):
    """A transformer layer with edges: EGT's layer without its gates.

    Normed edges give every head a bias; the clamped scores plus that bias update the edges. Nodes and edges each have a
    feed-forward part. Norms come first (pre-norm).

    Args:
        dim: width D of the nodes.
        num_heads: H.
        edge_dim: width De of the edges.
        dropout: of attention weights, and of what the parts add to nodes and edges.
        multiplier: width of the feed-forward parts' hidden layer, in D and De.
        clamp: (low, high) of the scaled scores; None for none.
        update_edges: whether edges are updated; else they are returned unchanged.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        edge_dim: int,
        dropout: float = 0.0,
        *,
        multiplier: float = 2.0,
        clamp: tuple[float, float] | None = (-5.0, 5.0),
        update_edges: bool = True,
    ) -> None:
        super().__init__()
        self.node_norm, self.edge_norm = nn.LayerNorm(dim), nn.LayerNorm(edge_dim)
        self.attention = EdgeAttention(dim, num_heads, dropout, batch_first=True, clamp=clamp)
        self.edge_to_bias = nn.Linear(edge_dim, num_heads)
        self.dropout = nn.Dropout(dropout)
        self.node_feed_forward = _feed_forward(dim, round(multiplier * dim), dropout)
        self.update_edges = update_edges
        if update_edges:
            self.scores_to_edge = nn.Linear(num_heads, edge_dim)
            self.edge_feed_forward = _feed_forward(edge_dim, round(multiplier * edge_dim), dropout)

    def forward(self, nodes: Tensor, edges: Tensor, neighbors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend over nodes, and update both.

        Args:
            nodes: [B, N, D].
            edges: [B, N, N, De]; row i receives, column j sends.
            neighbors: bool, broadcasts to [B, H, N, N]; None means a complete graph.

        Returns:
            nodes [B, N, D] and edges [B, N, N, De]; all pairs' edges are updated.
        """
        bias = self.edge_to_bias(self.edge_norm(edges)).permute(0, 3, 1, 2)  # [B, H, N, N]
        update = {"edge_bias": -1.0, "update": "all"} if self.update_edges else {}
        output, scores = self.attention(self.node_norm(nodes), bias=bias, neighbors=neighbors, **update)
        nodes = nodes + self.dropout(output)
        nodes = nodes + self.node_feed_forward(nodes)
        if scores is not None:
            # Without an edge the update is 1 + x - 1: the clamped scores, to which EGT adds the bias.
            scores = (scores + bias).to(bias.dtype)  # updated edges are float32 at least
            edges = edges + self.dropout(self.scores_to_edge(scores.permute(0, 2, 3, 1)))
            edges = edges + self.edge_feed_forward(edges)
        return nodes, edges


def biased_mha_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of DGL's ``BiasedMHA`` under the names of :class:`EdgeAttention`.

    ``q_proj``, ``k_proj`` and ``v_proj`` become the thirds of ``in_proj``; ``out_proj`` stays.
    """
    names = [name for name in ("weight", "bias") if f"q_proj.{name}" in state]
    weights = {f"in_proj_{n}": torch.cat([state[f"{p}_proj.{n}"] for p in "qkv"]) for n in names}
    return weights | {name: x for name, x in state.items() if name.startswith("out_proj.")}


EGT_NAMES = {
    "mha_ln_h": "node_norm",
    "mha_ln_e": "edge_norm",
    "lin_E": "edge_to_bias",
    "lin_O_e": "scores_to_edge",
    "ffn_ln_h": "node_feed_forward.0",
    "lin_W_h_1": "node_feed_forward.1",
    "lin_W_h_2": "node_feed_forward.3",
    "ffn_ln_e": "edge_feed_forward.0",
    "lin_W_e_1": "edge_feed_forward.1",
    "lin_W_e_2": "edge_feed_forward.3",
}
"""EGT's names of the parameters that :class:`EdgeTransformerLayer` has in the same shape."""


def egt_weights(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Weights of an EGT layer under the names of :class:`EdgeTransformerLayer`.

    In EGT's channels the head is the last axis, [3 * d, H], in its output too; here the head comes first. Its gates
    after the softmax (``lin_G``) have no counterpart and are left out.
    """
    weights = {}
    for name, x in state.items():
        module, _, kind = name.rpartition(".")
        if module in EGT_NAMES:
            weights[f"{EGT_NAMES[module]}.{kind}"] = x
        elif module == "lin_QKV":
            by_head = x.unflatten(0, (3, -1, num_heads)).transpose(1, 2)  # [3, H, d, ...]
            weights[f"attention.in_proj_{kind}"] = by_head.flatten(0, 2)
        elif name == "lin_O_h.weight":
            weights["attention.out_proj.weight"] = x.unflatten(1, (-1, num_heads)).transpose(1, 2).flatten(1)
        elif name == "lin_O_h.bias":
            weights["attention.out_proj.bias"] = x
    return weights
