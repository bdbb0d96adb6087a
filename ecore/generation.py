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
import torch.nn.functional as F
from torch import Tensor

from ecore.config import setting
from ecore.data.batches import Batch
from ecore.data.vocabulary import BOS, CLS, EOS, PAD, SPECIAL_WORDS, UNK
from ecore.errors import InputError

if TYPE_CHECKING:  # the model imports this module for `respond`
    from ecore.model.ecore import ECore
    from ecore.model.step_graph import StepGraph

METHODS = ("greedy", "beam", "sample")
NEVER = [PAD, UNK, BOS, CLS]
KEEP_ROWS = 0.75
"""Finished rows leave the batch when less than this share is left: copying the cache costs about a step."""
LOOK_EVERY = 8
"""On a GPU, words between two looks at which answers are done."""
NUCLEUS = 256
"""Top-p looks among this many words first."""


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

    Dropout in ``model.encode`` is the caller's: call ``model.eval()`` before. A sampled answer depends on its
    own context and the seed alone, not on the rest of the batch (up to rounding in the model): the seed and
    the context's words seed one ``torch.Generator`` per row.

    Args:
        model: has ``encode(batch)``, ``start(encoding, max_length)`` and ``step(words [B], cache)``, which
            gives new logits [B, V]; its caches have ``select(contexts)`` and ``branch(parents)`` as
            :class:`ecore.model.decoder.DecoderCache` has.
        batch: B contexts; the responses in it are not read.
        decoding: default greedy.
        encoding: ``model.encode(batch)`` where it is at hand already.

    Returns:
        B lists of 1 to ``max_length`` word ids, none of them special.
    """
    decoding = decoding or Decoding()
    encoding = model.encode(batch) if encoding is None else encoding
    with torch.inference_mode():
        steps = _Steps(model, model.start(encoding, decoding.max_length), batch.context.device)
        if decoding.method == "beam":
            return _beam_search(steps, len(batch.context), decoding)
        if decoding.method == "greedy":
            return _word_by_word(steps, len(batch.context), decoding, lambda scores, *_: scores.argmax(-1))
        numbers = _numbers(batch, decoding)

        def sample(scores: Tensor, rows: Tensor, position: int) -> Tensor:
            return _sample(scores, numbers[rows, position], decoding)

        return _word_by_word(steps, len(batch.context), decoding, sample)


class _Steps:
    """The steps of one call of :func:`generate`: scores of the words that may come, and when to look for the end.

    Attributes:
        cache: of the responses.
        device: where they are.
        shrinks: whether rows may leave the batch.
    """

    def __init__(self, model: ECore, cache: Any, device: torch.device) -> None:
        self.model, self.cache, self.device = model, cache, device
        self.shrinks = True
        self._graph: StepGraph | None = None
        self._never = torch.zeros(len(SPECIAL_WORDS), device=device)
        self._never[NEVER] = -math.inf

    def scores(self, words: Tensor, position: int) -> Tensor:
        """After ``words`` [B]: [B, V] in float32 at least, minus infinity where the word may not come."""
        if position == 1 and self.waits:
            from ecore.model.step_graph import step_graph  # loads the model, which the command line need not

            self._graph = step_graph(self.model, self.cache)
            if self._graph is not None:
                self.cache, self.shrinks = self._graph.cache, False
        logits = self.model.step(words, self.cache) if self._graph is None else self._graph(words)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits[:, : len(SPECIAL_WORDS)] += self._never if position else -math.inf
        return logits

    @property
    def waits(self) -> bool:
        """Whether looking at a value makes the host wait for the device."""
        return self.device.type == "cuda"

    def looks(self, position: int) -> bool:
        """Whether to look which answers are done after the word at ``position``."""
        return not self.waits or (position + 1) % LOOK_EVERY == 0


def _collect(answers: list[list[int]], rows: Tensor, words: Tensor) -> None:
    """``answers[rows[i]] = words[i]`` up to its EOS."""
    for row, answer in zip(rows.tolist(), words.tolist(), strict=True):
        answers[row] = answer[: [*answer, EOS].index(EOS)]


def _word_by_word(
    steps: _Steps, batch: int, decoding: Decoding, choose: Callable[[Tensor, Tensor, int], Tensor]
) -> list[list[int]]:
    """Extend every row by ``choose(scores [B, V], rows [B], position) -> words [B]`` until its EOS."""
    rows = torch.arange(batch, device=steps.device)  # which answer each row of the cache belongs to
    last = torch.full_like(rows, BOS)
    words = torch.full((batch, decoding.max_length), EOS, device=steps.device)
    answers: list[list[int]] = [[] for _ in range(batch)]
    for position in range(decoding.max_length):
        chosen = choose(steps.scores(last, position), rows, position)
        last = chosen if position == 0 else torch.where(last == EOS, EOS, chosen)
        words[:, position] = last
        if not steps.looks(position):
            continue
        running = last != EOS
        left = int(running.sum())
        if left == 0:
            break
        if steps.shrinks and left < KEEP_ROWS * len(rows) and position + 1 < decoding.max_length:
            _collect(answers, rows[~running], words[~running])
            keep = running.nonzero().squeeze(1)
            steps.cache.select(keep)
            rows, words, last = rows[keep], words[keep], last[keep]
    _collect(answers, rows, words)
    return answers


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
    vocabulary = scores.shape[1]
    ids: Tensor | None = None
    if decoding.top_k:
        scores, ids = scores.topk(min(decoding.top_k, vocabulary), dim=-1)
    probability = scores.double().softmax(-1)
    if decoding.top_p < 1.0:
        if ids is None:
            probability, ids = _likeliest(probability, decoding.top_p)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= decoding.top_p, 0.0)
    reached = probability.cumsum(-1)
    total = reached[:, -1]
    # The first place where `reached` is over the target: a word without probability is never that place.
    target = torch.minimum(numbers * total, total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(reached, target.unsqueeze(1), right=True)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def _likeliest(probability: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The likeliest words, by falling probability, as many as carry ``share`` in every row; and their ids.

    Sorting the whole vocabulary takes longer than all the rest of a step on CPU. On a GPU it does not, and
    looking whether the words are enough would wait for it.
    """
    vocabulary = probability.shape[1]
    count = vocabulary if probability.is_cuda else min(NUCLEUS, vocabulary)
    while True:
        likeliest, ids = probability.topk(count, dim=-1)
        if count == vocabulary or bool((likeliest.sum(-1) >= share).all()):
            return likeliest, ids
        count = min(8 * count, vocabulary)


def _beam_search(steps: _Steps, batch: int, decoding: Decoding) -> list[list[int]]:
    """Beam search for the highest  log P(Y) / |Y|^length_penalty.

    |Y| counts the words scored: EOS too, where the answer has one; an answer cut at ``max_length`` is
    scored as it stands. (Length normalisation as in Cho et al. 2014 and Jean et al. 2015, with the power as
    in Wu et al. 2016, Section 7, without their constant 5.) A hypothesis that ends leaves the beam for
    good, so one beam is greedy search. A row stops when no living hypothesis can still overtake its best
    finished one: log P only falls, so the bound is its log P over the length that flatters it most. That
    never changes the answer.
    """
    longest, power, device = decoding.max_length, decoding.length_penalty, steps.device
    rows = torch.arange(batch, device=device)  # which answer each beam belongs to
    # The hypotheses' log P [rows, width], minus infinity for a dead one, and words [rows, width, longest].
    totals = torch.zeros(batch, 1, device=device)
    words = torch.full((batch, 1, longest), EOS, device=device)
    last = torch.full_like(rows, BOS)
    best, best_words = torch.full((batch,), -math.inf, device=device), words[:, 0]
    answers: list[list[int]] = [[] for _ in range(batch)]
    for position in range(longest):
        scores = steps.scores(last, position).log_softmax(-1)
        vocabulary = scores.shape[-1]
        scores = scores.view(len(rows), -1, vocabulary).add_(totals.unsqueeze(2)).flatten(1)
        # Where there are fewer options than beams the surplus ones are dead: minus infinity.
        options = min(decoding.beams, scores.shape[1])
        totals, chosen = scores.topk(options, dim=-1)
        if options < decoding.beams:
            missing = (0, decoding.beams - options)
            totals, chosen = F.pad(totals, missing, value=-math.inf), F.pad(chosen, missing)
        parent, last = chosen // vocabulary, chosen % vocabulary
        words = words.gather(1, parent.unsqueeze(2).expand(-1, -1, longest))
        words[:, :, position] = last

        done = (last == EOS) if position + 1 < longest else torch.ones_like(last, dtype=torch.bool)
        ended, at = (totals / (position + 1) ** power).masked_fill(~done, -math.inf).max(1)
        finished = words[torch.arange(len(rows), device=device), at]
        best_words = torch.where((ended > best).unsqueeze(1), finished, best_words)
        best = torch.maximum(best, ended)
        totals = totals.masked_fill(done, -math.inf)
        if position + 1 == longest:
            break
        steps.cache.branch(parent)
        last = last.flatten()
        if not steps.looks(position):
            continue
        flattering = max((position + 2) ** power, longest**power)
        running = totals.max(1).values / flattering > best
        left = int(running.sum())
        if left == 0:
            break
        if steps.shrinks and left < KEEP_ROWS * len(rows):
            _collect(answers, rows[~running], best_words[~running])
            keep = running.nonzero().squeeze(1)
            steps.cache.select(keep)
            rows, totals, words, best, best_words = (x[keep] for x in (rows, totals, words, best, best_words))
            last = words[:, :, position].flatten()
    _collect(answers, rows, best_words)
    return answers
