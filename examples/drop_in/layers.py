"""Layers as code of empathetic dialogue models has them: attention, norm and loss written out in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PAD = 1
SMOOTHING = 0.1


class MultiHeadAttention(nn.Module):
    """Attention whose heads have ``depth`` columns together, linear layers without biases, the scale on the queries."""

    def __init__(self, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, (depth // heads) ** -0.5
        self.query_linear = nn.Linear(width, depth, bias=False)
        self.key_linear = nn.Linear(width, depth, bias=False)
        self.value_linear = nn.Linear(width, depth, bias=False)
        self.output_linear = nn.Linear(depth, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, N, d]

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """``mask`` [B, 1 or Nq, Nk] is True at what a query must not see."""
        q = self.split(self.query_linear(queries)) * self.scale
        k, v = self.split(self.key_linear(keys)), self.split(self.value_linear(values))
        logits = torch.matmul(q, k.transpose(2, 3))  # [B, H, Nq, Nk]
        logits = logits.masked_fill(mask[:, None], -1e18)
        weights = self.dropout(torch.softmax(logits, dim=-1))
        context = torch.matmul(weights, v).transpose(1, 2).flatten(2)  # [B, Nq, depth]
        return self.output_linear(context)


class AddNorm(nn.Module):
    """Residual connection, and the norm of what comes next; divides by the unbiased standard deviation + eps."""

    def __init__(self, width: int, dropout: float, eps: float = 1e-6) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.dropout, self.eps = nn.Dropout(dropout), eps

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.dropout(y)
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.gamma * (x - mean) / (std + self.eps) + self.beta, x


class VocabularyLoss(nn.Module):
    """Softmax over the vocabulary, KL divergence from the smoothed target, and the perplexity's loss."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, words)
        self.words = words
        self.divergence = nn.KLDivLoss(reduction="sum")
        self.nll = nn.NLLLoss(ignore_index=PAD)

    def forward(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss a word, and the mean NLL; of ``hidden`` [B, T, D] and ``target`` [B, T], PAD where there is none."""
        log_probability = torch.log_softmax(self.proj(hidden), dim=-1).flatten(0, 1)  # [B * T, V]
        target = target.flatten()
        goal = torch.full_like(log_probability, SMOOTHING / (self.words - 2))
        goal.scatter_(1, target[:, None], 1.0 - SMOOTHING)
        goal[:, PAD] = 0.0
        goal[target == PAD] = 0.0
        loss = self.divergence(log_probability, goal) / (target != PAD).sum()
        with torch.no_grad():
            return loss, self.nll(log_probability, target)


class EdgeLayer(nn.Module):
    """Graph attention whose scores are multiplied by edge weights, and which updates these by its scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.gate = nn.Linear(width, heads)
        self.edge_scale = nn.Parameter(torch.ones(()))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, N, d]

    def forward(self, nodes: Tensor, edge: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor]:
        """New nodes [B, N, D] and edges [B, H, N, N]; ``adjacency`` is 1 at neighbours."""
        q, k, v = (self.split(linear(nodes)) for linear in (self.query, self.key, self.value))
        gate = torch.sigmoid(self.gate(nodes)).transpose(1, 2)  # [B, H, N]
        score = self.scale * torch.matmul(q, k.transpose(2, 3)) * edge  # [B, H, N, N]
        weights = torch.softmax(score.masked_fill(adjacency == 0, -1e18), dim=-1)
        edge = gate[..., None] * self.edge_scale * (edge + score) * adjacency
        return torch.matmul(weights, v).transpose(1, 2).flatten(2), edge
