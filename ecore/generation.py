"""Answers from a model: greedy, beam search and sampling over one cached decoder.

No special word (PAD, UNK, BOS, CLS) is ever chosen, and EOS not as the first word: those options are taken
off the scores before the softmax, so probabilities and beam scores are of the model given that rule.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecore.config import setting
from ecore.data.batches import Batch
from ecore.data.vocabulary import BOS, CLS, EOS, PAD, UNK
from ecore.errors import InputError

if TYPE_CHECKING:  # the model imports this module for `respond`
    from ecore.model.ecore import ECore

METHODS = ("greedy", "beam", "sample")
NEVER = [PAD, UNK, BOS, CLS]
KEEP_ROWS = 0.75
"""Finished rows leave the batch when less than this share is left: copying the cache costs about a step."""


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Raises:
        InputError: a value out of range, or ``top_k``, ``top_p`` or ``temperature`` where nothing is sampled.
    """

    method: str = setting("greedy", "how words are chosen", METHODS)
    beams: int = setting(4, "beam: hypotheses kept alive")
    length_penalty: float = setting(1.0, "beam: power of the length that log-probabilities are divided by")
    top_k: int = setting(0, "sample: only among the k likeliest words (0: all)")
    top_p: float = setting(1.0, "sample: only among the likeliest words that together have this probability")
    temperature: float = setting(1.0, "sample: divides the scores; under 1 is more certain")
    max_length: int = setting(30, "words of an answer at most")
    seed: int | None = setting(None, "sample: seed (default: from torch's own generator)")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        for name, least in (("beams", 1), ("max_length", 1), ("top_k", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p: expected a number over 0, at most 1, got {self.top_p}")
        if not 0.0 < self.temperature < math.inf:
            raise InputError(f"temperature: expected a number over 0, got {self.temperature}")
        if not math.isfinite(self.length_penalty):
            raise InputError(f"length_penalty: expected a finite number, got {self.length_penalty}")
        if self.method != "sample":
            for name, unset in (("top_k", 0), ("top_p", 1.0), ("temperature", 1.0)):
                if getattr(self, name) != unset:
                    raise InputError(f"{name}: only for method 'sample', the method is {self.method!r}")


@torch.no_grad()
def generate(
    model: ECore, batch: Batch, decoding: Decoding | None = None, encoding: Any = None
) -> list[list[int]]:
    """Answer every context of ``batch`` in at most ``decoding.max_length`` words.

    Dropout is the caller's: call ``model.eval()`` before. A sampled answer depends on its own context and
    the seed alone, not on the rest of the batch (up to rounding in the model): the seed and the context's
    words seed one ``torch.Generator`` per row.

    Args:
        model: has ``encode(batch)``, ``start(encoding, max_length)`` and ``step(words [B], cache)``, which
            gives logits [B, V]; its caches have ``select(rows)``.
        batch: B contexts; the responses in it are not read.
        decoding: default greedy.
        encoding: ``model.encode(batch)`` where it is at hand already.

    Returns:
        B lists of 1 to ``max_length`` word ids, none of them special.
    """
    decoding = decoding or Decoding()
    cache = model.start(model.encode(batch) if encoding is None else encoding, decoding.max_length)
    if decoding.method == "beam":
        return _beam_search(model, cache, batch.context, decoding)
    if decoding.method == "greedy":
        return _word_by_word(model, cache, batch.context, decoding, lambda scores, *_: scores.argmax(-1))
    numbers = _numbers(batch, decoding)

    def sample(scores: Tensor, rows: Tensor, position: int) -> Tensor:
        return _sample(scores, numbers[rows, position], decoding)

    return _word_by_word(model, cache, batch.context, decoding, sample)


def _allowed(logits: Tensor, first: bool) -> Tensor:
    """Scores [B, V] in float32 at least, minus infinity where the word may not come."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    scores[:, NEVER] = -math.inf
    if first:
        scores[:, EOS] = -math.inf
    return scores


def _word_by_word(
    model: ECore,
    cache: Any,
    context: Tensor,
    decoding: Decoding,
    choose: Callable[[Tensor, Tensor, int], Tensor],
) -> list[list[int]]:
    """Extend every row by ``choose(scores [B, V], rows [B], position) -> words [B]`` until its EOS."""
    rows = torch.arange(len(context), device=context.device)  # which answer each row of the cache belongs to
    words = torch.full_like(rows, BOS)
    running = torch.ones_like(rows, dtype=torch.bool)
    answers = torch.full((len(rows), decoding.max_length), EOS, device=context.device)
    for position in range(decoding.max_length):
        chosen = choose(_allowed(model.step(words, cache), position == 0), rows, position)
        words = torch.where(running, chosen, EOS)
        answers[rows, position] = words
        running = words != EOS
        left = int(running.sum())
        if left == 0:
            break
        if left < KEEP_ROWS * len(rows) and position + 1 < decoding.max_length:
            keep = running.nonzero().squeeze(1)
            cache.select(keep)
            rows, words, running = rows[keep], words[keep], running[keep]
    return [answer[: [*answer, EOS].index(EOS)] for answer in answers.tolist()]


def _numbers(batch: Batch, decoding: Decoding) -> Tensor:
    """Numbers in [0, 1), float64 [B, max_length]: a row's depend on the seed and the row's context words."""
    seed = decoding.seed if decoding.seed is not None else int(torch.randint(2**62, ()))
    rows = []
    for words, length in zip(batch.context.tolist(), batch.lengths.tolist(), strict=True):
        key = hashlib.blake2b(repr((seed, words[:length])).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        rows.append(torch.rand(decoding.max_length, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(batch.context.device)


def _sample(scores: Tensor, numbers: Tensor, decoding: Decoding) -> Tensor:
    """One word a row by inverting the distribution function at ``numbers`` [B].

    top-k (Fan et al. 2018) first, then top-p (Holtzman et al. 2020): the likeliest words up to the one that
    carries the sum over ``top_p``; at least one is always left.
    """
    # The maximum off first, so that no temperature overflows.
    scores = (scores - scores.amax(-1, keepdim=True)) / decoding.temperature
    narrowed = decoding.top_k > 0 or decoding.top_p < 1.0
    if narrowed:
        vocabulary = scores.shape[1]
        scores, ids = scores.topk(min(decoding.top_k or vocabulary, vocabulary), dim=-1)
    probability = scores.double().softmax(-1)
    if decoding.top_p < 1.0:
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= decoding.top_p, 0.0)
    reached = probability.cumsum(-1)
    total = reached[:, -1]
    # The first place where `reached` is over the target: a word without probability is never that place.
    target = torch.minimum(numbers * total, total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(reached, target.unsqueeze(1), right=True)
    return (ids.gather(1, place) if narrowed else place).squeeze(1)


def _beam_search(model: ECore, cache: Any, context: Tensor, decoding: Decoding) -> list[list[int]]:
    """Beam search for the highest  log P(Y) / |Y|^length_penalty.

    |Y| counts the words scored: EOS too, where the answer has one; an answer cut at ``max_length`` is
    scored as it stands. (Length normalisation as in Cho et al. 2014 and Jean et al. 2015, with the power as
    in Wu et al. 2016, Section 7, without their constant 5.) A hypothesis that ends leaves the beam for
    good, so one beam is greedy search. A row stops when no living hypothesis can still overtake its best
    finished one: log P only falls, so the bound is its log P over the length that flatters it most. That
    never changes the answer.
    """
    longest, power = decoding.max_length, decoding.length_penalty
    device = context.device
    rows = torch.arange(len(context), device=device)  # which answer each beam belongs to
    # The hypotheses' log P [rows, width], minus infinity for a dead one, and words [rows, width, position].
    totals = torch.zeros(len(rows), 1, device=device)
    words = torch.zeros(len(rows), 1, 0, dtype=torch.int64, device=device)
    last = torch.full_like(rows, BOS)
    best = torch.full((len(rows),), -math.inf, device=device)
    answers: list[list[int]] = [[] for _ in rows]
    for position in range(longest):
        scores = _allowed(model.step(last, cache), position == 0).log_softmax(-1)
        vocabulary, width = scores.shape[-1], totals.shape[1]
        scores = (totals.unsqueeze(2) + scores.view(len(rows), width, vocabulary)).flatten(1)
        # Where there are fewer options than beams the surplus ones are dead: minus infinity.
        totals, chosen = scores.topk(min(decoding.beams, scores.shape[1]), dim=-1)
        parent, last = chosen // vocabulary, chosen % vocabulary
        before = words.gather(1, parent.unsqueeze(2).expand(-1, -1, position))
        words = torch.cat([before, last.unsqueeze(2)], dim=2)

        done = (last == EOS) if position + 1 < longest else torch.ones_like(last, dtype=torch.bool)
        ended, at = (totals / (position + 1) ** power).masked_fill(~done, -math.inf).max(1)
        for row in (ended > best).nonzero().squeeze(1).tolist():
            answers[rows[row]] = [word for word in words[row, at[row]].tolist() if word != EOS]
        best = torch.maximum(best, ended)
        totals = totals.masked_fill(done, -math.inf)

        flattering = max((position + 2) ** power, longest**power)
        keep = (totals.max(1).values / flattering > best).nonzero().squeeze(1)
        if len(keep) == 0:
            break
        offset = torch.arange(len(rows), device=device).unsqueeze(1) * width
        cache.select((offset + parent)[keep].flatten())
        rows, totals, words, best = rows[keep], totals[keep], words[keep], best[keep]
        last = last[keep].flatten()
    return answers
