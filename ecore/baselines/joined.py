"""An encoder of two concatenated features, with which MIME and CEM refine a context."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ecore.baselines.base import encode
from ecore.config import ModelConfig
from ecore.model.encoder import Encoder


class JoinedEncoder(nn.Module):
    """TRS_Enc([x; y]) of words x that all have the same y; both are projected to D together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.encoder = Encoder(config)

    def forward(self, x: Tensor, y: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return [B, M, D] from x [B, M, D] and y [B, D]; positions [M, D] are added, mask [B, M] bool."""
        joined = torch.cat([x, y[:, None].expand_as(x)], dim=-1)  # [B, M, 2 D]
        return encode(self.encoder, self.projection(joined) + positions, mask)
