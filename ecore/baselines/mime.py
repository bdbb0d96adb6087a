"""MIME: mimicking emotions for empathetic response generation (Majumder et al., EMNLP 2020).

The emotions are parted by polarity. From the context one emotion of each side is sampled; the side of the speaker's
emotion is mimicked, the other is not, and a gate mixes the context refined with either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecore.baselines.base import Baseline, Understanding, Words, encode
from ecore.baselines.joined import JoinedEncoder
from ecore.errors import InputError

POSITIVE_EMOTIONS = frozenset(
    {
        *("caring", "confident", "content", "excited", "faithful", "grateful", "hopeful", "impressed"),
        *("joyful", "prepared", "proud", "surprised", "trusting"),
    }
)
"""MIME's positive emotions; all others are negative, anticipating among them."""


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean and logarithm of the variance, each [B, D]."""

    mean: Tensor
    log_variance: Tensor

    def sample(self) -> Tensor:
        """Return mean + noise * deviation, [B, D]."""
        return self.mean + torch.randn_like(self.mean) * torch.exp(0.5 * self.log_variance)

    def divergence(self, other: Gaussian) -> Tensor:
        """Return KL(self || other), [B]."""
        ratio = (self.log_variance - other.log_variance).exp()
        distance = (self.mean - other.mean).square() / other.log_variance.exp()
        return 0.5 * (other.log_variance - self.log_variance + ratio + distance - 1.0).sum(-1)


class GaussianHead(nn.Module):
    """A Gaussian from hidden features [B, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(dim, dim)
        self.log_variance = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor) -> Gaussian:
        return Gaussian(self.mean(hidden), self.log_variance(hidden))


class EmotionSide(nn.Module):
    """The emotions of one polarity: their sampling from the context (prior), and its check by the refined one."""

    emotions: Tensor

    def __init__(self, dim: int, emotions: list[int]) -> None:
        super().__init__()
        self.register_buffer("emotions", torch.tensor(emotions), persistent=False)
        self.prior = GaussianHead(dim)
        self.hidden = nn.Linear(2 * dim, dim)
        self.posterior = GaussianHead(dim)
        self.weights = nn.Linear(dim, len(emotions))

    def mixture(self, z: Tensor, table: Tensor) -> Tensor:
        """Return softmax(W z) over the side's emotions times their vectors: z [B, D], table [P, D] -> [B, D]."""
        return self.weights(z).softmax(-1) @ table[self.emotions]

    def check(self, context: Tensor, refined: Tensor) -> Gaussian:
        """Return the posterior given the context [B, D] and the mean of the refined context [B, D]."""
        return self.posterior(F.relu(self.hidden(torch.cat([context, refined], dim=-1))))


class Fusion(nn.Module):
    """The gated mixture of the mimicking and the non-mimicking context: W' (sigmoid(W [m; m~] + b) * [m; m~]) + b'."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, 2 * dim)
        self.output = nn.Linear(2 * dim, dim)

    def forward(self, mimicking: Tensor, other: Tensor) -> Tensor:
        """Return [B, M, D] from two of that shape."""
        both = torch.cat([mimicking, other], dim=-1)
        return self.output(torch.sigmoid(self.gate(both)) * both)


class MIME(Baseline):
    """Mimicry by emotion polarity.

    In training the emotions of both sides are sampled and the polarity is the label's; otherwise z is its mean, so that
    an answer is the same each time, and the polarity is that of the emotion perceived.

    Raises:
        InputError: all emotions of the vocabulary have one polarity.
    """

    positive: Tensor

    def add_parts(self) -> None:
        """Make the two sides of emotions, and what refines a context by them."""
        config, emotions = self.config, self.vocabulary.emotions
        positive = [name in POSITIVE_EMOTIONS for name in emotions]
        sides = [[i for i, one in enumerate(positive) if one is wanted] for wanted in (True, False)]
        if not all(sides):
            raise InputError(
                "model: mime parts emotions by polarity; expected positive ones (joyful, proud, ...) and "
                f"negative ones, got {', '.join(emotions)}"
            )
        self.register_buffer("positive", torch.tensor(positive), persistent=False)  # [P]
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.hidden = nn.Linear(config.dim, config.dim)
        self.positive_side, self.negative_side = (EmotionSide(config.dim, side) for side in sides)
        self.mimicking, self.other = JoinedEncoder(config), JoinedEncoder(config)
        self.fusion = Fusion(config.dim)

    @property
    def emotion_vectors(self) -> Tensor:
        """Return the emotions' vectors E, [P, D]: they are mixed, and they classify, e_p = E W c."""
        return self.perceiver.main.weight

    def understand(self, words: Words) -> Understanding:
        """Encode the words, and refine them by the emotions of both polarities."""
        memory = encode(self.encoder, words.embedded, words.mask)  # [B, M, D]
        context = memory[:, 0]  # [B, D]
        signal = self.query(context)  # [B, D]
        hidden = F.relu(self.hidden(context))  # [B, D]
        sides = (self.positive_side, self.negative_side)
        priors = [side.prior(hidden) for side in sides]
        chosen = [prior.sample() if self.training else prior.mean for prior in priors]
        positive, negative = (
            side.mixture(z, self.emotion_vectors) for side, z in zip(sides, chosen, strict=True)
        )
        emotion = words.batch.emotion if self.training else self.perceiver.main(signal).argmax(-1)  # [B]
        mimics = self.positive[emotion][:, None]  # [B, 1], where the positive side is mimicked
        positions = self.embedding.position[: memory.shape[1]]
        mimicking = self.mimicking(memory, torch.where(mimics, positive, negative), positions, words.mask)
        other = self.other(memory, torch.where(mimics, negative, positive), positions, words.mask)
        losses: dict[str, Tensor] | None = None
        if self.training:
            mimicked, avoided = (self._mean(refined, words) for refined in (mimicking, other))  # [B, D]
            of_positive = torch.where(mimics, mimicked, avoided)
            of_negative = torch.where(mimics, avoided, mimicked)
            posteriors = (
                self.positive_side.check(context, of_positive),
                self.negative_side.check(context, of_negative),
            )
            divergences = [
                posterior.divergence(prior) for posterior, prior in zip(posteriors, priors, strict=True)
            ]
            losses = {"divergence": torch.stack(divergences).sum(0).mean()}
        return Understanding(self.fusion(mimicking, other), words.mask, signal, words.batch.context, losses)

    @staticmethod
    def _mean(refined: Tensor, words: Words) -> Tensor:
        return (refined * words.mask[..., None]).sum(1) / words.batch.lengths[:, None]
