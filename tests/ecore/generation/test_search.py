"""Decoding, against a table of probabilities small enough to enumerate, and against the real model without
a cache."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from ecore import pipeline
from ecore.config import ModelConfig
from ecore.data.batches import Batch, context_batch
from ecore.data.text import detokenize, tokenize
from ecore.data.vocabulary import BOS, EOS, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.generation.cuda_graph import StaticCache, step_graph
from ecore.generation.decoding import Decoding
from ecore.generation.search import NEVER, _Steps, generate
from ecore.model import ECore
from ecore.model.transformer import attend, project

WORDS = (5, 6, 7)
SIZE = 8


class Cache:
    """The contexts, the words so far of ``width`` rows of each, and how many rows were stepped."""

    def __init__(self, context: torch.Tensor) -> None:
        self.context, self.width = context, 1
        self.words = torch.zeros(len(context), 0, dtype=torch.int64)
        self.stepped: list[int] = []

    def select(self, contexts: torch.Tensor) -> None:
        self.words = self.words.unflatten(0, (-1, self.width))[contexts].flatten(0, 1)
        self.context = self.context[contexts]

    def branch(self, parents: torch.Tensor) -> None:
        words = self.words.unflatten(0, (-1, self.width))
        self.words = torch.cat([row[parent] for row, parent in zip(words, parents, strict=True)])
        self.width = parents.shape[1]


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
        return self.logits(cache.context.repeat_interleave(cache.width, 0), cache.words)

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


def test_ends_with_the_longest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where finished rows stay in the batch: what they are fed is EOS, and they do not come back."""
    monkeypatch.setattr("ecore.generation.search.KEEP_ROWS", 0.0)
    model = Table(length=20, eos=1.5)
    answers = generate(model, make_batch(10), Decoding(max_length=20))
    assert model.cache.stepped == [10] * (max(map(len, answers)) + 1)
    assert len(model.cache.stepped) < 20


def test_beam_rows_that_are_done_cost_nothing() -> None:
    model = Table(length=20, eos=2.0)
    generate(model, make_batch(40), Decoding("beam", beams=3, length_penalty=0.0, max_length=20))
    stepped = model.cache.stepped
    assert stepped[:2] == [40, 120]
    assert stepped[-1] < 40
    assert sum(stepped) < 0.5 * 120 * 20


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
        return self.scores.repeat(len(context), 1)


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


def test_top_p_over_a_vocabulary_larger_than_it_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are the same whether the likeliest are found among a few, among more or by sorting all."""
    answers = []
    for first in (1, 3, 400):
        monkeypatch.setattr("ecore.generation.sampling.NUCLEUS", first)
        model = Table(size=400, spread=3.0)
        answers.append(generate(model, make_batch(30), Decoding("sample", max_length=5, seed=2, top_p=0.9)))
    assert answers[0] == answers[1] == answers[2]
    assert len({word for answer in answers[0] for word in answer}) > 50


@pytest.mark.parametrize("look", [2, 3, 50])
@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_looking_seldom_for_the_end_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, method: str, look: int
) -> None:
    decoding = Decoding(method, max_length=9, seed=3, **({"beams": 3} if method == "beam" else {}))
    batch, models = make_batch(30), [Table(length=9, eos=1.5) for _ in range(2)]
    answers = generate(models[0], batch, decoding)
    monkeypatch.setattr(_Steps, "looks", lambda self, position: (position + 1) % look == 0)
    assert generate(models[1], batch, decoding) == answers
    assert sum(models[1].cache.stepped) > sum(models[0].cache.stepped)


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
    reply = pipeline.ECore(real).respond(CONTEXTS[0], max_length=4)
    words = generate(real, real_batch(real, CONTEXTS[:1]), Decoding(max_length=4))[0]
    assert reply == detokenize(real.vocabulary.decode(words))
    with pytest.raises(InputError, match="beams"):
        pipeline.ECore(real).respond(CONTEXTS[0], method="beam", beams=0)


# The parts of a step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 200])
@pytest.mark.parametrize("columns", [7, 64, 701])
def test_project_is_linear(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, threads: int) -> None:
    monkeypatch.setattr("ecore.model.transformer._LARGE", 1000)  # the smallest stays under it
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, bias = (torch.randn(shape).double() for shape in ((rows, 24), (columns, 24), (columns,)))
        result = project(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(result, x @ weight.mT + bias)
    assert result.is_contiguous()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("masked", ["nothing", "per row", "for all rows"])
def test_attend_is_attention(batch: int, queries: int, masked: str) -> None:
    shape = (batch, 2, queries, 5)
    query, keys, values = (torch.randn(shape if i == 0 else (batch, 2, 6, 5)).double() for i in range(3))
    bias = None
    if masked != "nothing":
        bias = torch.zeros(batch if masked == "per row" else 1, 1, 1, 6).double()
        bias[..., 4:] = -math.inf
        bias[0, ..., 3:] = -math.inf
    scores = query @ keys.mT * 5**-0.5 + (0.0 if bias is None else bias)
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(query, keys, values, bias), expected)


def step_both(real: ECore, cache: Any, static: StaticCache, words: torch.Tensor) -> None:
    expected = real.step(words, cache)
    torch.testing.assert_close(real.step(words, static), expected)


@torch.no_grad()
def test_static_cache_steps_as_the_growing_one(real: ECore) -> None:
    """It holds more room and more context than asked, and what a former call left there."""
    old = real.start(real.encode(real_batch(real, CONTEXTS[1::2])), 11)
    old.branch(torch.zeros(2, 3, dtype=torch.int64))
    static = StaticCache(old)
    static.words.fill_(math.nan)
    static.memory.fill_(math.nan)
    cache = real.start(real.encode(real_batch(real, CONTEXTS[::2])), 9)
    real.step(torch.full((2,), BOS), cache)
    cache.branch(torch.zeros(2, 3, dtype=torch.int64))
    assert cache.words.shape[4] < static.words.shape[4]
    assert cache.memory.shape[4] < static.memory.shape[4]
    static.load(cache)
    held = [static.words.data_ptr(), static.memory.data_ptr(), static.mask.data_ptr()]
    for i in range(4):
        step_both(real, cache, static, torch.tensor([5, 6, 7, 8, 9, 10]) + i)
        parents = torch.tensor([[2, 0, 0], [1, 1, 2]])
        cache.branch(parents)
        static.branch(parents)
    assert static.length == cache.length == int(static.position)
    assert held == [static.words.data_ptr(), static.memory.data_ptr(), static.mask.data_ptr()]


@torch.no_grad()
def test_beams_share_their_context(real: ECore) -> None:
    cache = real.start(real.encode(real_batch(real, CONTEXTS)), 4)
    memory = cache.memory.data_ptr()
    real.step(torch.full((4,), BOS), cache)
    cache.branch(torch.zeros(4, 5, dtype=torch.int64))
    assert (cache.memory.shape[2], cache.words.shape[2], cache.memory.data_ptr()) == (4, 20, memory)
    cache.select(torch.tensor([3, 1]))
    assert (cache.memory.shape[2], cache.words.shape[2]) == (2, 10)


class Uncaptured:
    """A StepGraph that steps eagerly: what surrounds a capture, on any machine."""

    made = 0

    def __init__(self, model: ECore, cache: Any) -> None:
        self.model, self.cache = model, StaticCache(cache)
        Uncaptured.made += 1

    def __call__(self, words: torch.Tensor) -> torch.Tensor:
        return self.model.step(words, self.cache)


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_answers_from_a_static_cache(real: ECore, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    decoding = Decoding(method, seed=4, max_length=12, **({"beams": 3} if method == "beam" else {}))
    turns = [CONTEXTS, CONTEXTS[::-1], CONTEXTS[:2], CONTEXTS[2:], CONTEXTS]
    expected = [generate(real, real_batch(real, contexts), decoding) for contexts in turns]
    monkeypatch.setattr(_Steps, "waits", True)
    monkeypatch.setattr("ecore.generation.search.LOOK_EVERY", 3)
    monkeypatch.setattr("ecore.generation.cuda_graph.StepGraph", Uncaptured)
    monkeypatch.setattr("ecore.generation.cuda_graph._graphs", WeakKeyDictionary())
    Uncaptured.made = 0
    assert [generate(real, real_batch(real, contexts), decoding) for contexts in turns] == expected
    assert Uncaptured.made == 2  # of four contexts and of two, each at its second call


def test_graphs_follow_the_weights_and_are_few(real: ECore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecore.generation.cuda_graph.StepGraph", Uncaptured)
    monkeypatch.setattr("ecore.generation.cuda_graph._graphs", graphs := WeakKeyDictionary())
    model, batch = copy.deepcopy(real), real_batch(real, CONTEXTS)
    cache = model.start(model.encode(batch), 9)
    assert step_graph(model, cache) is None
    first = step_graph(model, cache)
    assert step_graph(model, model.start(model.encode(batch), 16)) is first  # the same room, rounded
    model.output.weight = torch.nn.Parameter(model.output.weight.clone())
    assert step_graph(model, cache) is None
    assert step_graph(model, cache) is not first
    with torch.autocast("cpu"):
        assert step_graph(model, cache) is None
    for room in range(1, 200, 8):
        step_graph(model, model.start(model.encode(batch), room))
    assert len(graphs[model]) == 8
    del model, first
    gc.collect()
    assert len(graphs) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_length=13),
        Decoding("beam", beams=3, max_length=13),
        Decoding("sample", seed=4, top_p=0.9),
    ],
    ids=lambda decoding: decoding.method,
)
def test_graphs_answer_as_the_cpu_does(real: ECore, decoding: Decoding) -> None:
    """The first call steps eagerly, the second captures, the third and those on new weights replay."""
    cuda = copy.deepcopy(real).cuda()
    for _ in range(2):
        for contexts in (CONTEXTS, CONTEXTS[::-1], CONTEXTS, CONTEXTS[::-1]):
            batch = real_batch(real, contexts)
            assert generate(cuda, batch.to("cuda"), decoding) == generate(real, batch, decoding)
        with torch.no_grad():  # in place: a graph has to see it
            real.decoder.blocks[0].self_attention.query.weight.mul_(0.5)
            cuda.decoder.blocks[0].self_attention.query.weight.mul_(0.5)
    with torch.no_grad():
        real.decoder.blocks[0].self_attention.query.weight.mul_(4.0)


@pytest.mark.gpu
@torch.inference_mode()
def test_graph_replays_the_eager_step(real: ECore) -> None:
    cuda = copy.deepcopy(real).cuda()
    words = torch.tensor([5, 6, 7, 8], device="cuda")
    for turn in range(4):
        cache = cuda.start(cuda.encode(real_batch(real, CONTEXTS).to("cuda")), 9)
        cuda.step(words + turn, cache)
        graph = step_graph(cuda, cache)
        assert (graph is None) == (turn == 0)
        for i in range(5 if graph else 0):
            torch.testing.assert_close(graph(words + i), cuda.step(words + i, cache))
