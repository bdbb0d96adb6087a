"""Word by word with the cache gives what whole responses give."""

from __future__ import annotations

import pytest
import torch

from ecore import pipeline
from ecore.data.vocabulary import BOS
from ecore.errors import InputError
from ecore.pipeline import Reply

SETTINGS = [
    {},
    {"strategy": "hard"},
    {"ablations": ("graph",)},
    {"ablations": ("co-g",)},
    {"tie_embeddings": True},
]


def step_through(model, cache, words):
    """Logits [B, T, V] of feeding ``words`` [B, T] one at a time."""
    return torch.stack([model.step(words[:, t], cache) for t in range(words.shape[1])], 1)


def shifted(batch):
    """Return the decoder's input: BOS and all but the last word."""
    return torch.cat([torch.full((len(batch.response), 1), BOS), batch.response[:, :-1]], 1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("room", [7, 30])
@torch.no_grad()
def test_cached_logits_are_forwards(make, settings, room):
    model, batch = make.model(**settings).double(), make.batch()
    output = model(batch)
    cache = model.start(output.encoding, room)
    torch.testing.assert_close(step_through(model, cache, shifted(batch)), output.logits)
    assert cache.length == 7


@torch.no_grad()
def test_no_word_sees_a_later_one(make):
    model, batch = make.model(), make.batch()
    changed = batch.response.clone()
    changed[:, 4:] = 9
    logits, other = model(batch).logits, model(batch._replace(response=changed)).logits
    torch.testing.assert_close(other[:, :5], logits[:, :5])  # word t reads the words before it: 0 to t - 1
    assert not torch.allclose(other[:, 5:], logits[:, 5:])


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
@pytest.mark.parametrize("rows", [[2, 0, 3, 1], [1], [0, 0, 3, 3, 3], [3, 1]])
@torch.no_grad()
def test_select_keeps_reorders_and_duplicates(make, settings, rows):
    """Half of a response, then other rows in other places, then the rest of theirs."""
    model, batch = make.model(**settings).double(), make.batch()
    expected, words = model(batch).logits, shifted(batch)
    cache = model.start(model.encode(batch), 7)
    step_through(model, cache, words[:, :3])
    cache.select(torch.tensor(rows))
    rest = step_through(model, cache, words[rows][:, 3:])
    torch.testing.assert_close(rest, expected[rows][:, 3:])


@torch.no_grad()
def test_branches_of_one_row_go_their_own_ways(make):
    """A duplicated row may go on with another word: the copies share nothing."""
    model, batch = make.model().double(), make.batch()
    cache = model.start(model.encode(batch), 7)
    words = shifted(batch)
    step_through(model, cache, words[:, :3])
    cache.select(torch.tensor([0, 0]))
    model.step(torch.tensor([20, 30]), cache)
    branches = model.step(torch.tensor([21, 31]), cache)
    for branch, start in zip(branches, (20, 30), strict=True):
        response = torch.cat([words[:1, 1:3], torch.tensor([[start, start + 1, 5]])], 1)
        one = make.rows(batch, [0])._replace(response=response)
        torch.testing.assert_close(branch, model(one).logits[0, 4])


@torch.no_grad()
def test_no_room_left(make):
    model, batch = make.model(), make.batch()
    cache = model.start(model.encode(batch), 2)
    words = torch.full((4,), BOS)
    model.step(words, cache)
    model.step(words, cache)
    with pytest.raises(IndexError):
        model.step(words, cache)


# respond ----------------------------------------------------------------------------------------------------


def test_respond(make):
    model = make.model(strategy="hard")
    reply = pipeline.ECore(model).respond(["word1 word2 sad", "word3", "word4"], max_length=6)
    assert isinstance(reply, Reply)
    assert reply == pipeline.ECore(model).respond(["word1 word2 sad", "word3", "word4"], max_length=6)
    assert 1 <= len(reply.split()) <= 6
    names, probabilities = zip(*reply.emotions, strict=True)
    assert sorted(names) == sorted(model.vocabulary.emotions)
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1.0, abs=1e-5)
    assert 1 <= len(reply.relevant) <= 5
    # Dropout is off while it answers, and on again afterwards.
    model.train()
    assert (
        pipeline.ECore(model).respond(["word1 word2 sad", "word3", "word4"], max_length=6).emotions
        == reply.emotions
    )
    assert model.training


@pytest.mark.parametrize("turns", [[], "  ", ["word1", "  "]])
def test_respond_refuses(make, turns):
    with pytest.raises(InputError, match="respond: "):
        pipeline.ECore(make.model()).respond(turns)
