"""Decoding, against a table of probabilities small enough to enumerate, and against the real model without
a cache."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from ecore.config import ModelConfig
from ecore.data.batches import Batch, WordTables, context_batch
from ecore.data.text import detokenize, tokenize
from ecore.data.vocabulary import BOS, EOS, Vocabulary
from ecore.errors import InputError
from ecore.generation import NEVER, Decoding, generate
from ecore.model import ECore

WORDS = (5, 6, 7)
SIZE = 8


class Cache:
    """The words so far of every row, and how many rows were stepped."""

    def __init__(self, context: torch.Tensor) -> None:
        self.context = context
        self.words = torch.zeros(len(context), 0, dtype=torch.int64)
        self.stepped: list[int] = []

    def select(self, rows: torch.Tensor) -> None:
        self.context, self.words = self.context[rows], self.words[rows]


class Table:
    """Scores that depend on the context's second word and on every word so far; special words score
    highest."""

    def __init__(self, size: int = SIZE, spread: float = 2.0, length: int = 5, eos: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(3)
        self.scores = spread * torch.randn(length, 97, size, generator=generator, dtype=torch.float64)
        self.scores[:, :, NEVER] += 50.0
        self.scores[:, :, EOS] += eos

    def encode(self, batch: Batch) -> torch.Tensor:
        return batch.context

    def start(self, encoding: torch.Tensor, max_length: int) -> Cache:
        self.cache = Cache(encoding)
        return self.cache

    def step(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        cache.words = torch.cat([cache.words, tokens[:, None]], 1)
        cache.stepped.append(len(tokens))
        return self.logits(cache.context, cache.words)

    def logits(self, context: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        position = words.shape[1] - 1
        mixed = (words * torch.arange(1, position + 2)).sum(1) * 7 + context[:, 1] * 13
        return self.scores[position, mixed % 97]

    def log_probability(self, context: torch.Tensor, answer: tuple[int, ...]) -> float:
        """Of the answer given the rule that special words never come and EOS not first."""
        total = 0.0
        for position, word in enumerate(answer):
            scores = self.logits(context[None], torch.tensor([[BOS, *answer[:position]]]))[0].clone()
            scores[NEVER + ([EOS] if position == 0 else [])] = -math.inf
            total += float(scores.log_softmax(0)[word])
        return total


def make_batch(rows: int, width: int = 3) -> Batch:
    context = torch.zeros(rows, width, dtype=torch.int64)
    context[:, 0] = 4
    context[:, 1] = torch.arange(rows) + 5
    empty = torch.zeros(rows, 0, dtype=torch.int64)
    return Batch(
        context, (context > 0).long(), torch.full((rows,), 2), empty, empty, torch.zeros(rows).long()
    )


def pick(batch: Batch, rows: list[int]) -> Batch:
    return Batch(*(tensor[rows] for tensor in batch))


def every_answer(length: int) -> list[tuple[int, ...]]:
    """All answers of at most ``length`` words, with EOS where shorter."""
    answers = [(*w, EOS) for n in range(1, length) for w in itertools.product(WORDS, repeat=n)]
    return answers + list(itertools.product(WORDS, repeat=length))


def test_greedy_takes_the_best_allowed_word_and_stops_at_eos() -> None:
    model, batch = Table(length=6, eos=1.0), make_batch(20)
    answers = generate(model, batch, Decoding(max_length=6))
    for row, answer in enumerate(answers):
        expected: list[int] = []
        while len(expected) < 6:
            scores = model.logits(batch.context[row : row + 1], torch.tensor([[BOS, *expected]]))[0]
            options = WORDS if not expected else (EOS, *WORDS)
            best = max(options, key=lambda word: scores[word])
            if best == EOS:
                break
            expected.append(best)
        assert answer == expected
    assert len({len(a) for a in answers}) > 3  # otherwise the case is too easy


def test_rows_that_are_done_cost_nothing() -> None:
    model = Table(length=20, eos=1.5)
    generate(model, make_batch(40), Decoding(max_length=20))
    stepped = model.cache.stepped
    assert stepped[0] == 40
    assert stepped[-1] < 10
    assert sum(stepped) < 0.5 * 40 * 20


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@pytest.mark.parametrize("max_length", [1, 2, 5])
def test_length_limit_no_empty_answer_no_special_word(method: str, max_length: int) -> None:
    for eos in (-2.0, 30.0):  # an end that hardly ever comes, and one that always would
        answers = generate(Table(eos=eos), make_batch(30), Decoding(method, max_length=max_length, seed=1))
        assert all(1 <= len(answer) <= max_length for answer in answers)
        assert {word for answer in answers for word in answer} <= set(WORDS)


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0, -0.5])
def test_wide_beam_finds_the_best_of_all_answers(power: float) -> None:
    model, batch = Table(spread=1.5), make_batch(12)
    # 200 beams are more than there ever are options: nothing is pruned.
    answers = generate(model, batch, Decoding("beam", beams=200, length_penalty=power, max_length=4))
    every = every_answer(4)
    for row, answer in enumerate(answers):
        best = max(every, key=lambda a: model.log_probability(batch.context[row], a) / len(a) ** power)
        assert tuple(answer) == tuple(w for w in best if w != EOS)
    assert len({len(a) for a in answers}) > 1


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_beam_against_a_plain_one(power: float) -> None:
    """Three beams prune; a search written down word by word, without any early stop, prunes the same."""
    model, batch = Table(spread=1.0, length=5), make_batch(25)
    answers = generate(model, batch, Decoding("beam", beams=3, length_penalty=power, max_length=5))
    for row, answer in enumerate(answers):
        alive: list[tuple[int, ...]] = [()]
        finished: list[tuple[int, ...]] = []
        for position in range(5):
            options = [(*a, w) for a in alive for w in ((EOS, *WORDS) if position else WORDS)]
            options.sort(key=lambda a: -model.log_probability(batch.context[row], a))
            finished += [a for a in options[:3] if a[-1] == EOS]
            alive = [a for a in options[:3] if a[-1] != EOS]
        scores = {a: model.log_probability(batch.context[row], a) / len(a) ** power for a in finished + alive}
        best = max(scores, key=scores.__getitem__)
        assert tuple(answer) == tuple(w for w in best if w != EOS)


def test_beam_stops_early() -> None:
    model = Table(length=20, eos=8.0)
    generate(model, make_batch(8), Decoding("beam", beams=3, length_penalty=0.0, max_length=20))
    assert len(model.cache.stepped) < 10


def test_one_beam_is_greedy() -> None:
    batch = make_batch(40)
    for eos in (-1.0, 2.0):
        model = Table(length=6, eos=eos)
        one = generate(model, batch, Decoding("beam", beams=1, max_length=6))
        assert one == generate(model, batch, Decoding(max_length=6))


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 1.7}])
def test_sample_follows_seed_and_context_alone(limits: dict[str, float]) -> None:
    model, batch = Table(), make_batch(30)
    decoding = Decoding("sample", max_length=5, seed=11, **limits)
    answers = generate(model, batch, decoding)
    assert answers == generate(model, batch, decoding)
    assert answers != generate(model, batch, Decoding("sample", max_length=5, seed=12, **limits))
    some = [17, 3, 25]
    wider = pick(make_batch(30, width=9), some)
    assert generate(model, wider, decoding) == [answers[row] for row in some]


def test_sample_without_seed_follows_torch() -> None:
    model, batch = Table(), make_batch(30)
    torch.manual_seed(5)
    first = generate(model, batch, Decoding("sample", max_length=5))
    assert first != generate(model, batch, Decoding("sample", max_length=5))
    torch.manual_seed(5)
    assert first == generate(model, batch, Decoding("sample", max_length=5))


class Fixed(Table):
    """The same probabilities whatever came before: 5, 6, 7 in the proportion 5 : 3 : 2."""

    def __init__(self) -> None:
        self.scores = torch.full((SIZE,), 40.0, dtype=torch.float64)
        self.scores[EOS] = -math.inf
        self.scores[list(WORDS)] = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64).log()

    def logits(self, context: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.scores.expand(len(context), -1)


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({}, (0.3, 0.5, 0.2)),
        ({"temperature": 0.5}, (0.09 / 0.38, 0.25 / 0.38, 0.04 / 0.38)),
        ({"temperature": 1e-30}, (0.0, 1.0, 0.0)),
        ({"top_k": 2}, (3 / 8, 5 / 8, 0.0)),
        ({"top_k": 50}, (0.3, 0.5, 0.2)),
        ({"top_p": 0.4}, (0.0, 1.0, 0.0)),
        ({"top_p": 0.6}, (3 / 8, 5 / 8, 0.0)),
        ({"top_p": 0.85}, (0.3, 0.5, 0.2)),
        ({"top_k": 2, "top_p": 0.6}, (0.0, 1.0, 0.0)),
    ],
)
def test_sampled_shares(limits: dict[str, float], expected: tuple[float, ...]) -> None:
    answers = generate(Fixed(), make_batch(1500), Decoding("sample", max_length=8, seed=0, **limits))
    flat = torch.tensor([word for answer in answers for word in answer])
    assert len(flat) == 12_000
    for word, share in zip(WORDS, expected, strict=True):
        # Five standard deviations; exact where a word must or must not come.
        allowed = 5 * math.sqrt(share * (1 - share) / len(flat))
        assert abs(float((flat == word).double().mean()) - share) <= allowed


@pytest.mark.parametrize(
    "options, named",
    [
        ({"method": "best"}, "method"),
        ({"method": "beam", "beams": 0}, "beams"),
        ({"max_length": 0}, "max_length"),
        ({"method": "sample", "top_k": -1}, "top_k"),
        ({"method": "sample", "top_p": 0.0}, "top_p"),
        ({"method": "sample", "top_p": 1.5}, "top_p"),
        ({"method": "sample", "top_p": math.nan}, "top_p"),
        ({"method": "sample", "temperature": 0.0}, "temperature"),
        ({"method": "sample", "temperature": math.nan}, "temperature"),
        ({"method": "beam", "length_penalty": math.inf}, "length_penalty"),
        ({"top_k": 5}, "top_k"),
        ({"method": "beam", "temperature": 0.5}, "temperature"),
    ],
)
def test_refuses_what_makes_no_sense(options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: ") as caught:
        Decoding(**options)
    assert "\n" not in str(caught.value)


CONTEXTS = [
    ["I lost my keys this morning and I was late for work."],
    ["My dog died.", "I am so sorry.", "Thank you. He was fifteen, and he had been with me since school."],
    ["I passed my exam!"],
    ["Someone broke into my car last night.", "That is awful! Was anything taken?", "Everything."],
]


@pytest.fixture(scope="module", params=["soft", "hard"])
def real(request: pytest.FixtureRequest) -> ECore:
    """A small model in float64 (so that rounding decides nothing) that answers differently."""
    emotions = ("sad", "joyful", "afraid", "angry", "proud", "hopeful")
    counts = Counter(word for context in CONTEXTS for turn in context for word in tokenize(turn))
    vocabulary = Vocabulary.from_counts(counts, emotions)
    torch.manual_seed(1)
    size = len(vocabulary)
    tables = WordTables(
        torch.rand(size) * 0.25, torch.zeros(size, 0, dtype=torch.int32), torch.zeros(size, 0)
    )
    config = ModelConfig(dim=24, encoder_blocks=2, decoder_blocks=2, strategy=request.param)
    model = ECore(config, vocabulary, tables).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # large weights: at its usual start the model says one word over and over
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 4 / weight.shape[1] ** 0.5)
        model.output.bias[EOS] += 7.0
    return model


def real_batch(model: ECore, contexts: list[list[str]]) -> Batch:
    return context_batch(contexts, model.vocabulary, model.tables)


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
    greedy = generate(real, batch, Decoding(max_length=5))
    wide = generate(real, batch, Decoding("beam", beams=60, max_length=5, length_penalty=0.0))

    def total(row: int, answer: list[int]) -> float:
        complete = torch.tensor([answer if len(answer) == 5 else [*answer, EOS]])
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
    reply = real.respond(CONTEXTS[0], max_length=4)
    words = generate(real, real_batch(real, CONTEXTS[:1]), Decoding(max_length=4))[0]
    assert reply == detokenize(real.vocabulary.decode(words))
    with pytest.raises(InputError, match="beams"):
        real.respond(CONTEXTS[0], method="beam", beams=0)
