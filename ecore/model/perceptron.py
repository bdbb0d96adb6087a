"""The emotion signal perceptron (Eqs. 8 to 10) and the gate on its signal (Eq. 12)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.config import ModelConfig
from ecore.model.released_graph import xavier
from ecore.precision import for_products


class Perception(NamedTuple):
    """Emotion signals, each [B, P].

    Attributes:
        global_signal: h^g, before its LayerNorm.
        main_logits: h^m, logits of the emotion categories.
        emotion_attention: h_emo, the final attention to each emotion.
        gate: sigma(W_e h^g).
    """

    global_signal: Tensor
    main_logits: Tensor
    emotion_attention: Tensor
    gate: Tensor


class Perceptron(nn.Module):
    """From edge weights and context to emotion signals.

    In the released form h^g is x + x^T E^{e-e}, and the gate of Eq. 12 reads what Eq. 9 reads. In the paper's, with
    ``graph_norm``, an emotion cannot drown the others in h^g however strong its edges: see :meth:`aggregation`.
    """

    own: Tensor

    def __init__(self, config: ModelConfig, emotions: int) -> None:
        super().__init__()
        self.aggregate = "co-p" not in config.ablations
        self.released = config.released
        self.normed = config.graph_norm and not self.released
        self.own_weight = config.own_weight
        self.gated = "gate-g" not in config.ablations
        self.register_buffer("own", torch.eye(emotions, dtype=torch.bool), persistent=False)
        self.norm = nn.LayerNorm(emotions) if self.normed else nn.Identity()
        self.context = nn.Linear(config.dim, emotions)
        self.main = nn.Linear(2 * emotions, emotions)
        self.gate = nn.Linear(2 * emotions if self.released else emotions, emotions)
        if self.released:
            xavier(self)

    def aggregation(self, emotion_to_emotion: Tensor) -> Tensor:
        """Return the weights by which Eq. 8 sums emotions up, [B, P, P]: E^{e-e} with a diagonal of 1.

        In the released form I + E^{e-e}^T, its own diagonal kept.

        Nothing bounds an edge: a row of thousands, which training does make, would leave only itself after the
        LayerNorm on h^g. So with ``graph_norm`` what an emotion hears from others is divided by the sum of its
        absolute values where that is over 1. Its own weight stays 1 (``own_weight``): gates multiply all of a row
        but the diagonal, which would vanish if the whole row were divided.
        """
        if self.released:
            return emotion_to_emotion.mT + torch.eye(
                emotion_to_emotion.shape[-1], device=emotion_to_emotion.device
            )
        own = self.own
        if self.normed and self.own_weight:
            others = emotion_to_emotion.masked_fill(own, 0.0)  # [B, P, P]
            total = torch.linalg.vector_norm(others, 1, -1, keepdim=True)  # [B, P, 1]
            return (others / F.threshold(total, 1.0, 1.0)).masked_fill(own, 1.0)
        edges = emotion_to_emotion.masked_fill(own, 1.0)  # [B, P, P]
        return F.normalize(edges, p=1.0, dim=-1) if self.normed else edges

    def forward(self, word_to_emotion: Tensor, emotion_to_emotion: Tensor, context: Tensor) -> Perception:
        """Return the emotion signals of contexts.

        Args:
            word_to_emotion: [B, P], sum over words of E^{w-e}.
            emotion_to_emotion: [B, P, P], E^{e-e} (row i receives from column j), whatever its diagonal.
            context: [B, D], mean of h_X.
        """
        global_signal = word_to_emotion  # [B, P]
        if self.aggregate:
            # Not a matrix product: under autocast that would round the edge weights.
            global_signal = (self.aggregation(emotion_to_emotion) * word_to_emotion[:, None]).sum(-1)
        normed = for_products(self.norm(global_signal))  # [B, P]
        both = torch.cat([normed, self.context(context)], dim=1)  # [B, 2 P]
        main = self.main(both)  # [B, P]
        gate = torch.sigmoid(self.gate(both if self.released else normed))  # [B, P]
        return Perception(global_signal, main, gate * main + main if self.gated else main, gate)
