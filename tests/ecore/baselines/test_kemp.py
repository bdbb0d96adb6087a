"""KEMP's equations, written out in plain torch."""

from __future__ import annotations

import pytest
import torch

from ecore.baselines.base import encode
from ecore.baselines.kemp import KEMP, attention_loss
from ecore.config import for_model
from ecore.errors import InputError
from tests.ecore.model.conftest import TINY, tables_of


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


@torch.no_grad()
def test_neighbors(make):
    """[CLS] hears all; a word hears [CLS], the word before it, and the related words that are its own."""
    model, batch = make.model("kemp"), make.batch()
    mask = batch.context != 0
    neighbors, nodes = model.neighbors(batch, mask)
    words = batch.context.shape[1]
    seen = 0
    for row, length in enumerate(batch.lengths.tolist()):
        concepts = [i for i in batch.concepts[row].tolist() if i]
        for i in range(length):
            related = model.related[batch.context[row, i]].tolist()
            expected = set(range(length)) if i == 0 else {0, i - 1}
            expected |= {words + k for k, concept in enumerate(concepts) if i == 0 or concept in related}
            assert set(neighbors[row, i].nonzero().flatten().tolist()) == expected
            seen += i > 0 and len(expected) > 2
        assert nodes[row].sum() == length + len(concepts)
    assert seen > 5  # there are words with related words of their own


@torch.no_grad()
def test_equations(make):
    model, batch = make.model("kemp").double(), make.batch()
    encoding = model.encode(batch)
    vectors, _ = model.embedding.look_up(batch.context, batch.concepts)
    embedded = model.embedding.place(vectors, batch.state)
    related = model.embedding.look_up(batch.concepts)[0] + model.embedding.state.weight[4]
    neighbors, _ = model.neighbors(batch, batch.context != 0)
    graph, words = model.concept_graph, batch.context.shape[1]
    for row, length in enumerate(batch.lengths.tolist()):
        count = int((batch.concepts[row] != 0).sum())
        nodes = torch.cat([embedded[row, :length], related[row, :count]])
        sees = torch.cat(
            [neighbors[row, :length, :length], neighbors[row, :length, words : words + count]], 1
        )
        query = linear(nodes[:length], graph.query)
        key, value = linear(nodes, graph.key), linear(nodes, graph.value)
        share = (query @ key.T / 24**0.5).exp() * sees
        heard = linear(share / share.sum(1, keepdim=True) @ value, graph.output)
        new = torch.nn.functional.layer_norm(
            nodes[:length] + heard, (24,), graph.norm.weight, graph.norm.bias
        )
        memory = encode(
            model.encoder, torch.cat([new, nodes[length:]])[None], torch.ones(1, len(nodes), dtype=torch.bool)
        )
        eta = (
            2 * model.intensity[torch.cat([batch.context[row, :length], batch.concepts[row, :count]])].sqrt()
        )
        signal = (eta.exp() / eta.exp().sum()) @ memory[0]
        torch.testing.assert_close(encoding.guidance[row], signal)
        torch.testing.assert_close(encoding.perceived.main_logits[row], model.perceiver.main.weight @ signal)


@torch.no_grad()
def test_the_signal_starts_and_joins_the_response(make):
    model, batch = make.model("kemp").double(), make.batch()
    encoding = model.encode(batch)
    torch.testing.assert_close(
        model._bos_embedding(encoding), linear(encoding.perceived.main_logits, model.start_word)
    )
    silent = encoding._replace(perceived=encoding.perceived._replace(guidance=encoding.guidance * 0))
    words = model.embedding.look_up(batch.response)[0]
    assert not torch.allclose(model._decode(words, encoding).states, model._decode(words, silent).states)


def test_attention_loss_by_hand():
    """Two words of a response over three nodes, one of them padding; and a second, padded word."""
    scores = torch.tensor([[[0.0, 0.0, 9.0], [50.0, 0.0, 9.0], [7.0, -7.0, 9.0]]])
    words = torch.tensor([[True, True, False]])
    weight, nodes = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[True, True, False]])
    # a = ((1/2 + 1) / 2, (1/2 + 0) / 2) = (3/4, 1/4)
    assert attention_loss(scores, words, weight, nodes).item() == pytest.approx(2 * 0.25**2 / 2)


@torch.no_grad()
def test_the_loss_has_a_tenth_of_it(make):
    model, batch = make.model("kemp").double(), make.batch()
    output = model(batch)
    words = model.embedding.look_up(torch.cat([torch.full((4, 1), 3), batch.response[:, :-1]], 1))[0]
    scores = model._decode(words, output.encoding).scores
    mask = output.encoding.memory_mask
    weight = model.intensity_weight(batch, mask)
    expected = 0.1 * attention_loss(scores, batch.response != 0, weight, mask)
    losses = model.loss(batch, health=True)
    torch.testing.assert_close(losses.health["emotional_attention"], expected)
    torch.testing.assert_close(losses.total, losses.generation + losses.emotion + expected.double())


def test_what_it_needs(make):
    with pytest.raises(InputError, match=r"kemp needs related words.*--relations"):
        KEMP(for_model(TINY, "kemp"), make.vocabulary, tables_of(make.vocabulary))
    for part in ("copy", "commonsense"):
        with pytest.raises(InputError, match=f"{part}: model kemp"):
            make.model("kemp", **{part: False})
