"""The layers of :mod:`examples.drop_in.layers` on ecore_kernels: the same names, arguments and weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ecore_kernels import dropout_add_layer_norm, edge_attention, linear_cross_entropy
from examples.drop_in import layers
from examples.drop_in.layers import PAD, SMOOTHING


class MultiHeadAttention(layers.MultiHeadAttention):
    """Scores, softmax, dropout and sum in one kernel; neighbours are what is not masked."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        q = self.split(self.query_linear(queries))
        k, v = self.split(self.key_linear(keys)), self.split(self.value_linear(values))
        dropout = self.dropout.p if self.training else 0.0
        context, _ = edge_attention(
            q, k, v, neighbors=~mask[:, None], scale=self.scale, dropout=dropout
        )  # [B, H, Nq, d]
        return self.output_linear(context.transpose(1, 2).flatten(2))


class AddNorm(layers.AddNorm):
    """Dropout, sum and norm in one pass; the unbiased deviation of D numbers is sqrt(D / (D - 1)) times the biased."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gamma = self.gamma * math.sqrt(1 - 1 / x.shape[-1])
        return dropout_add_layer_norm(
            y, x, gamma, self.beta, self.dropout.p, eps=self.eps**2, training=self.training
        )


class VocabularyLoss(layers.VocabularyLoss):
    """Output layer and loss chunk by chunk, for words alone: neither the logits nor the goals are ever whole."""

    def forward(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        said = target != PAD
        loss, nll = linear_cross_entropy(
            hidden[said],
            self.proj.weight,
            self.proj.bias,
            target[said],
            label_smoothing=SMOOTHING,
            smoothing_classes=self.words - 2,
            ignore_index=PAD,
        )
        # What a KL divergence has beyond a cross entropy, a constant: so that curves are the same.
        entropy = SMOOTHING * math.log(SMOOTHING / (self.words - 2)) + (1 - SMOOTHING) * math.log1p(
            -SMOOTHING
        )
        return loss + entropy, nll.mean()


class EdgeLayer(layers.EdgeLayer):
    """Attention and the edges' update in one kernel."""

    def forward(self, nodes: Tensor, edge: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (self.split(linear(nodes)) for linear in (self.query, self.key, self.value))
        gate = torch.sigmoid(self.gate(nodes)).transpose(1, 2)  # [B, H, N]
        output, new_edge = edge_attention(
            q, k, v, edge, adjacency != 0, gate=gate, edge_scale=self.edge_scale, scale=self.scale
        )
        assert new_edge is not None, "a gate updates the edges"
        return output.transpose(1, 2).flatten(2), new_edge
