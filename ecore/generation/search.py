"""Answers from a model: greedy, beam search and sampling over one cached decoder.

No special word (PAD, UNK, BOS, CLS) is ever chosen, and neither EOS nor a word without text as the first word, so that
every answer has text. These options are removed from the scores before the softmax, so probabilities and beam scores
are the model's under that rule. In a beam search the words that ``no_repeat_ngram`` forbids are removed after the
softmax, so the scores stay the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ecore.data.batches import Batch
from ecore.data.vocabulary import BOS, CLS, EOS, PAD, SPECIAL_WORDS, UNK
from ecore.generation import cuda_graph
from ecore.generation.decoding import Decoding
from ecore.generation.sampling import row_numbers, sampled
from ecore.model.base import EmpatheticModel
from ecore.model.ecore import ECore
from ecore.model.outputs import expect_finite

NEVER = [PAD, UNK, BOS, CLS]
KEEP_ROWS = 0.75
"""Finished rows leave the batch when less than this share is left: copying the cache costs about a step."""
LOOK_EVERY = 8
"""On a GPU, words between two looks at which answers are done."""

Watch = Callable[[list[int], list[int]], Collection[int]]
"""Hears (rows, words) at each step: the answers in the making and the new word of each, EOS where it ends. Beam search
has no words before its end: it gives (rows, []). Returns the rows that nobody waits for any more."""


@torch.no_grad()
def generate(
    model: EmpatheticModel,
    batch: Batch,
    decoding: Decoding | None = None,
    encoding: Any = None,
    watch: Watch | None = None,
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
        watch: hears every word as it is chosen, and may give answers up. On a GPU the host then waits for every word.

    Returns:
        B lists of 1 to ``max_length`` word ids, none of them special; less of an answer that was given up.

    Raises:
        InputError: the model's scores are not finite.
    """
    decoding = decoding or Decoding()
    encoding = model.encode(batch) if encoding is None else encoding
    with torch.inference_mode():
        steps = _Steps(model, model.start(encoding, decoding.max_length), batch.context.device, watch)
        answers = _answers(steps, batch, decoding)
        expect_finite(torch.where(steps.usable, 0.0, math.nan), "scores of words")
    return answers


def _answers(steps: _Steps, batch: Batch, decoding: Decoding) -> list[list[int]]:
    if decoding.method == "beam":
        return _beam_search(steps, len(batch.context), decoding)
    if decoding.method == "greedy":

        def likeliest(last: Tensor, said: Tensor, rows: Tensor, position: int) -> Tensor:
            return steps.likeliest(last, position, said, decoding.no_repeat_ngram)

        return _word_by_word(steps, len(batch.context), decoding, likeliest)
    numbers = row_numbers(batch, decoding)

    def sample(last: Tensor, said: Tensor, rows: Tensor, position: int) -> Tensor:
        scores = without_repeats(steps.scores(last, position), said, decoding.no_repeat_ngram)
        return sampled(scores, numbers[rows, position], decoding)

    return _word_by_word(steps, len(batch.context), decoding, sample)


class _Steps:
    """The steps of one call of :func:`generate`: scores of the words that may come, and when to look for the end.

    Attributes:
        cache: of the responses.
        device: where they are.
        shrinks: whether rows may leave the batch.
        usable: no score so far was NaN or infinite.
    """

    def __init__(
        self, model: EmpatheticModel, cache: Any, device: torch.device, watch: Watch | None = None
    ) -> None:
        self.model, self.cache, self.device = model, cache, device
        self._watch = watch
        self.shrinks = True
        self.usable = torch.ones((), dtype=torch.bool, device=device)  # no look: it would wait for a GPU
        self._graph: cuda_graph.StepGraph | None = None
        self._never = torch.zeros(len(SPECIAL_WORDS), device=device)
        self._never[NEVER] = -math.inf
        self._blank: Tensor | None = getattr(model, "blank", None)

    def scores(self, last: Tensor, position: int) -> Tensor:
        """After the words ``last`` [B]: [B, V] in float32 at least, minus infinity where the word may not come."""
        if position == 1 and self.waits:
            self._graph = cuda_graph.step_graph(self.model, self.cache)
            if self._graph is not None:
                self.cache, self.shrinks = self._graph.cache, False
        logits = self.model.step(last, self.cache) if self._graph is None else self._graph(last)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [B, V]
        self.usable &= (logits < math.inf).all()
        if not self.waits:  # what is sampled from NaN may be no word at all
            expect_finite(logits, "scores of words")
        logits[:, : len(SPECIAL_WORDS)] += self._never if position else -math.inf
        if position == 0 and self._blank is not None:
            logits[:, self._blank] = -math.inf
        return logits

    def likeliest(self, last: Tensor, position: int, said: Tensor, no_repeat: int) -> Tensor:
        """Return the likeliest words [B] after ``last`` [B] in the answers ``said`` [B, T]."""
        if not getattr(self.cache, "chooses", False):
            return without_repeats(self.scores(last, position), said, no_repeat).argmax(-1)
        never = torch.tensor(NEVER if position else range(len(SPECIAL_WORDS)), device=self.device)
        forbidden = never.expand(len(last), -1)  # [B, F]
        if (repeated := repeats(said, no_repeat)) is not None:
            forbidden = torch.cat([forbidden, repeated], dim=1)  # [B, F + R]
        assert isinstance(self.model, ECore)  # whose cache it is
        chosen, logit = self.model.step_argmax(last, self.cache, forbidden)  # [B] each
        self.usable &= (logit < math.inf).all()
        if not self.waits:
            expect_finite(logit, "scores of words")
        return chosen

    @property
    def waits(self) -> bool:
        """True where reading a value makes the host wait for the device."""
        return self.device.type == "cuda"

    def looks(self, position: int) -> bool:
        """Return True if the search checks which answers are done after the word at ``position``."""
        return not self.waits or (position + 1) % LOOK_EVERY == 0

    def given_up(self, rows: Tensor, last: Tensor | None = None) -> Tensor | None:
        """Let the watcher hear the words ``last`` of ``rows``, [R] each; bool [R] where it gives up some, or None."""
        if self._watch is None:
            return None
        gone = self._watch(rows.tolist(), [] if last is None else last.tolist())
        return torch.isin(rows, torch.tensor(sorted(gone), device=rows.device)) if gone else None


def without_repeats(scores: Tensor, said: Tensor, length: int) -> Tensor:
    """Take the words off ``scores`` [B, V], in place, that :func:`repeats` finds; returns scores."""
    repeated = repeats(said, length)
    return scores if repeated is None else scores.scatter_(1, repeated, -math.inf)


def repeats(said: Tensor, length: int) -> Tensor | None:
    """Find the words that would end a sequence of ``length`` words a second time in their answer.

    EOS never would, so an answer can end.

    Args:
        said: int64 [B, T], the answers so far.
        length: of the sequences; 0 forbids none.

    Returns:
        [B, R] words, PAD where a sequence is none of those; None where there can be none.
    """
    if not 0 < length <= said.shape[1]:
        return None
    sequences = said.unfold(1, length, 1)  # [B, R, length], R = T - length + 1
    begun = said[:, said.shape[1] - length + 1 :]  # [B, length - 1], the last words
    ends = sequences[:, :, -1]  # [B, R]
    repeated = (sequences[:, :, :-1] == begun[:, None]).all(-1) & (ends != EOS)  # [B, R]
    # PAD may never come anyway. Without it a word that is forbidden once and allowed once would be a race.
    return torch.where(repeated, ends, PAD)


def _collect(answers: list[list[int]], rows: Tensor, said: Tensor) -> None:
    """``answers[rows[i]] = said[i]`` up to its EOS."""
    for row, answer in zip(rows.tolist(), said.tolist(), strict=True):
        answers[row] = answer[: [*answer, EOS].index(EOS)]


def _word_by_word(
    steps: _Steps, count: int, decoding: Decoding, choose: Callable[[Tensor, Tensor, Tensor, int], Tensor]
) -> list[list[int]]:
    """Extend ``count`` answers by ``choose(last [R], said [R, position], rows [R], position)`` until their EOS."""
    # R rows are left in the cache, at first B; which answer each of them belongs to:
    rows = torch.arange(count, device=steps.device)  # [R]
    last = torch.full_like(rows, BOS)  # [R]
    said = torch.full((count, decoding.max_length), EOS, device=steps.device)  # [R, max_length]
    answers: list[list[int]] = [[] for _ in range(count)]
    for position in range(decoding.max_length):
        chosen = choose(last, said[:, :position], rows, position)  # [R]
        last = chosen if position == 0 else torch.where(last == EOS, EOS, chosen)
        if (gone := steps.given_up(rows, last)) is not None:
            last = last.masked_fill(gone, EOS)
        said[:, position] = last
        if not steps.looks(position):
            continue
        running = last != EOS  # [R]
        left = int(running.sum())
        if left == 0:
            break
        if steps.shrinks and left < KEEP_ROWS * len(rows) and position + 1 < decoding.max_length:
            _collect(answers, rows[~running], said[~running])
            keep = running.nonzero().squeeze(1)  # [R'], the rows that go on
            steps.cache.select(keep)
            rows, said, last = rows[keep], said[keep], last[keep]
    _collect(answers, rows, said)
    return answers


def _beam_search(steps: _Steps, count: int, decoding: Decoding) -> list[list[int]]:
    """Beam search for the ``count`` answers of the highest  log P(Y) / |Y|^length_penalty.

    |Y| counts the words scored: EOS too, where the answer has one; an answer cut at ``max_length`` is
    scored as it is. (Length normalisation as in Cho et al. 2014 and Jean et al. 2015, with the power as
    in Wu et al. 2016, Section 7, without their constant 5.) A hypothesis that ends leaves the beam for
    good, so one beam is greedy search. A row stops when no living hypothesis can still overtake its best
    finished one: log P only falls, so the bound is its log P over the length that flatters it most. That
    never changes the answer.
    """
    longest, power, device = decoding.max_length, decoding.length_penalty, steps.device
    # R beams of W hypotheses are left; which answer each beam belongs to:
    rows = torch.arange(count, device=device)  # [R]
    totals = torch.zeros(count, 1, device=device)  # [R, W], log P, minus infinity of a dead hypothesis
    said = torch.full((count, 1, longest), EOS, device=device)  # [R, W, longest]
    last = torch.full_like(rows, BOS)  # [R W]
    best, best_said = torch.full((count,), -math.inf, device=device), said[:, 0]  # [R], [R, longest]
    answers: list[list[int]] = [[] for _ in range(count)]
    for position in range(longest):
        scores = steps.scores(last, position).log_softmax(-1)  # [R W, V]
        scores = without_repeats(scores, said.flatten(0, 1)[:, :position], decoding.no_repeat_ngram)
        vocabulary = scores.shape[-1]
        scores = scores.view(len(rows), -1, vocabulary).add_(totals.unsqueeze(2)).flatten(1)  # [R, W V]
        # Where there are fewer options than beams the surplus ones are dead: minus infinity.
        options = min(decoding.beams, scores.shape[1])
        totals, chosen = scores.topk(options, dim=-1)  # [R, options] each
        if options < decoding.beams:
            missing = (0, decoding.beams - options)
            totals, chosen = F.pad(totals, missing, value=-math.inf), F.pad(chosen, missing)
        parent, last = chosen // vocabulary, chosen % vocabulary  # [R, W] each, W = decoding.beams
        said = said.gather(1, parent.unsqueeze(2).expand(-1, -1, longest))
        said[:, :, position] = last

        done = (last == EOS) if position + 1 < longest else torch.ones_like(last, dtype=torch.bool)
        ended, at = (totals / (position + 1) ** power).masked_fill(~done, -math.inf).max(1)  # [R] each
        finished = said[torch.arange(len(rows), device=device), at]  # [R, longest]
        best_said = torch.where((ended > best).unsqueeze(1), finished, best_said)
        best = torch.maximum(best, ended)
        totals = totals.masked_fill(done, -math.inf)
        if position + 1 == longest:
            break
        steps.cache.branch(parent)
        last = last.flatten()
        if not steps.looks(position):
            continue
        flattering = max((position + 2) ** power, longest**power)
        running = totals.max(1).values / flattering > best  # [R]
        if (gone := steps.given_up(rows)) is not None:
            running &= ~gone
        left = int(running.sum())
        if left == 0:
            break
        if steps.shrinks and left < KEEP_ROWS * len(rows):
            _collect(answers, rows[~running], best_said[~running])
            keep = running.nonzero().squeeze(1)  # [R']
            steps.cache.select(keep)
            rows, totals, said, best, best_said = (x[keep] for x in (rows, totals, said, best, best_said))
            last = said[:, :, position].flatten()
    _collect(answers, rows, best_said)
    return answers
