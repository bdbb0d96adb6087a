"""The real model's answers: against decoding without a cache, alone and in company."""

from __future__ import annotations

import math

import pytest
import torch

from ecore import pipeline
from ecore.data.text import detokenize
from ecore.data.vocabulary import EOS
from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.generation.search import NEVER, generate
from ecore.model import ECore
from tests.ecore.generation.dialogues import CONTEXTS, real_batch


def test_cache_changes_nothing(real: ECore) -> None:
    batch = real_batch(real, CONTEXTS)
    answers = generate(real, batch, Decoding(max_length=12))
    for row, answer in enumerate(answers):
        one = real_batch(real, CONTEXTS[row : row + 1])
        expected: list[int] = []
        while len(expected) < 12:
            # The model over the whole answer so far, its last word still to come.
            response = torch.tensor([[*expected, EOS]])
            with torch.no_grad():
                scores = real(one._replace(response=response)).logits[0, -1]
            scores[NEVER + ([] if expected else [EOS])] = -math.inf
            word = int(scores.argmax())
            if word == EOS:
                break
            expected.append(word)
        assert answer == expected
    assert len({tuple(a) for a in answers}) > 1
    assert len({len(a) for a in answers}) > 1


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_length=8),
        Decoding("beam", beams=3, max_length=8),
        Decoding("sample", seed=4, max_length=8),
    ],
    ids=lambda decoding: decoding.method,
)
def test_padding_and_company_change_no_word(real: ECore, decoding: Decoding) -> None:
    batch = real_batch(real, CONTEXTS)
    answers = generate(real, batch, decoding)
    for row, context in enumerate(CONTEXTS):
        assert generate(real, real_batch(real, [context]), decoding) == [answers[row]]
    wider = batch._replace(
        context=torch.nn.functional.pad(batch.context, (0, 9)),
        state=torch.nn.functional.pad(batch.state, (0, 9)),
    )
    assert generate(real, wider, decoding) == answers
    assert generate(real, batch, decoding, encoding=real.encode(wider)) == answers


def test_beam_scores_are_those_of_the_model(real: ECore) -> None:
    """With the cache reordered at every step, what comes out scores at least as high as greedy's answer."""
    batch = real_batch(real, CONTEXTS)
    greedy = generate(real, batch, Decoding(max_length=8))
    wide = generate(real, batch, Decoding("beam", beams=60, max_length=8, length_penalty=0.0))

    def total(row: int, answer: list[int]) -> float:
        complete = torch.tensor([answer if len(answer) == 8 else [*answer, EOS]])
        one = real_batch(real, CONTEXTS[row : row + 1])
        with torch.no_grad():
            logits = real(one._replace(response=complete)).logits[0]
        logits[:, NEVER] = -math.inf
        logits[0, EOS] = -math.inf
        return float(logits.log_softmax(-1).gather(1, complete[0][:, None]).sum())

    gains = [total(row, wide[row]) - total(row, greedy[row]) for row in range(len(CONTEXTS))]
    assert min(gains) > -1e-6
    assert max(gains) > 1e-3


def test_respond(real: ECore) -> None:
    reply = pipeline.ECore(real).respond(CONTEXTS[0], max_length=4)
    words = generate(real, real_batch(real, CONTEXTS[:1]), Decoding(max_length=4))[0]
    assert reply == detokenize(real.vocabulary.decode(words))
    with pytest.raises(InputError, match="beams"):
        pipeline.ECore(real).respond(CONTEXTS[0], method="beam", beams=0)
