"""The emotion signal perceptron (Eqs. 8 to 10) and the gate on its signal (Eq. 12)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ecore.config import ModelConfig


class Perception(NamedTuple):
    """Emotion signals, each [B, P].

    Attributes:
        global_signal: h^g, before its LayerNorm.
        main: h^m, logits of the emotion categories.
        attention: h_emo, the final attention to each emotion.
        gate: sigma(W_e h^g).
    """

    global_signal: Tensor
    main: Tensor
    attention: Tensor
    gate: Tensor


class Perceptron(nn.Module):
    """From edge weights and context to emotion signals."""

    def __init__(self, config: ModelConfig, emotions: int) -> None:
        super().__init__()
        self.aggregate = "co-p" not in config.ablations
        self.gated = "gate-g" not in config.ablations
        self.norm = nn.LayerNorm(emotions) if config.graph_norm else nn.Identity()
        self.context = nn.Linear(config.dim, emotions)
        self.main = nn.Linear(2 * emotions, emotions)
        self.gate = nn.Linear(emotions, emotions)

    def forward(self, word_to_emotion: Tensor, emotion_to_emotion: Tensor, context: Tensor) -> Perception:
        """Perceive.

        Args:
            word_to_emotion: [B, P], sum over words of E^{w-e}.
            emotion_to_emotion: [B, P, P], E^{e-e} (row i receives from column j); its diagonal counts as 1.
            context: [B, D], mean of h_X.
        """
        global_signal = word_to_emotion
        if self.aggregate:
            own = torch.eye(word_to_emotion.shape[1], dtype=torch.bool, device=word_to_emotion.device)
            edges = torch.where(own, 1.0, emotion_to_emotion)
            # Not a matrix product: under autocast that would round the edge weights.
            global_signal = (edges * word_to_emotion[:, None]).sum(-1)
        normed = self.norm(global_signal)
        main = self.main(torch.cat([normed, self.context(context)], dim=1))
        gate = torch.sigmoid(self.gate(normed))
        return Perception(global_signal, main, gate * main + main if self.gated else main, gate)
