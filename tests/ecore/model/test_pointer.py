"""Copying and the emotions' start, against what their equations say word by word."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ecore.config import ModelConfig, from_dict, to_dict
from ecore.data.vocabulary import BOS, CLS, EOS, PAD, UNK
from ecore.errors import InputError
from ecore.generation.cuda_graph import StaticCache
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.model.losses import vocabulary_losses
from ecore.model.pointer import Copyable, Copying, mixed
from ecore.model.transformer import mean_scores
from ecore_kernels.reference_kernels import linear_cross_entropy

# Contexts with a word twice, unknown words and padding; and one without anything to copy.
CONTEXTS = torch.tensor([[CLS, 7, 9, 7, UNK, 8], [CLS, 6, 6, 6, PAD, PAD], [CLS, UNK, PAD, PAD, PAD, PAD]])
TARGETS = torch.tensor(
    [7, 5, 8, 6, PAD, 9, 5]
)  # copied twice, not there, copied once, thrice, none, not there
ROWS = torch.tensor([0, 0, 0, 1, 1, 1, 2])
WORDS, DIM = 11, 4


def problem(seed: int = 0):
    """States, weight, bias, gates and scores, all float64 with a gradient."""
    torch.manual_seed(seed)
    shapes = [(len(ROWS), DIM), (WORDS, DIM), (WORDS,), (len(ROWS),), (len(ROWS), CONTEXTS.shape[1])]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def copying(gate: torch.Tensor, scores: torch.Tensor) -> Copying:
    """As :class:`ecore.model.pointer.Pointer` hands it over."""
    context = Copyable.of(CONTEXTS).rows(ROWS)
    gate = gate.masked_fill(~context.allowed.any(-1), torch.inf)
    return Copying(gate, scores.masked_fill(~context.allowed, -torch.inf), context)


def probabilities(logits: torch.Tensor, gate: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """P as the equation says, place by place."""
    rows = []
    for n, row in enumerate(ROWS.tolist()):
        places = [i for i, word in enumerate(CONTEXTS[row].tolist()) if word > CLS]
        generated = logits[n].softmax(0)
        if not places:
            rows.append(generated)
            continue
        p, attention = gate[n].sigmoid(), scores[n, places].softmax(0)
        out = [p * g for g in generated.unbind()]
        for place, share in zip(places, attention.unbind(), strict=True):
            word = int(CONTEXTS[row, place])
            out[word] = out[word] + (1 - p) * share
        rows.append(torch.stack(out))
    return torch.stack(rows)


def test_slots_are_first_places():
    assert Copyable.of(CONTEXTS).slots.tolist() == [
        [0, 1, 2, 1, 4, 5],
        [0, 1, 1, 1, 4, 4],
        [0, 1, 2, 2, 2, 2],
    ]


def test_scores_are_the_heads_mean():
    queries, keys = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    wanted = sum(q @ k.mT / 8**0.5 for q, k in zip(queries.unbind(1), keys.unbind(1), strict=True)) / 3
    torch.testing.assert_close(mean_scores(queries, keys), wanted)


def test_the_mixture_by_its_equation():
    states, weight, bias, gate, scores = problem()
    logits = F.linear(states, weight, bias)
    wanted = probabilities(logits, gate, scores)
    torch.testing.assert_close(wanted.sum(1), torch.ones(len(ROWS), dtype=torch.float64))
    log_p = mixed(logits, copying(gate, scores))
    torch.testing.assert_close(log_p.exp(), wanted)
    inputs = (states, weight, bias, gate, scores)
    factor = torch.randn_like(wanted)
    got = torch.autograd.grad((log_p * factor).sum(), inputs, retain_graph=True)
    expected = torch.autograd.grad((wanted.log() * factor).sum(), inputs)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [2, 128])
def test_the_fused_loss_is_the_mixtures(smoothing, chunk, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", chunk)
    states, weight, bias, gate, scores = inputs = problem(1)
    loss, nll = vocabulary_losses(states, weight, bias, TARGETS, smoothing, 0.5, copying(gate, scores))
    log_p = probabilities(F.linear(states, weight, bias), gate, scores).log()
    counted = TARGETS != PAD
    wanted_nll = torch.where(counted, -log_p[range(len(TARGETS)), TARGETS], 0.0)
    wanted = (1 - smoothing) * wanted_nll - smoothing * torch.where(counted, log_p.mean(1), 0.0)
    torch.testing.assert_close(nll, wanted_nll.detach())
    torch.testing.assert_close(loss, 0.5 * wanted.sum())
    got = torch.autograd.grad(3.0 * loss, inputs)
    torch.testing.assert_close(got, torch.autograd.grad(1.5 * wanted.sum(), inputs))


def test_extreme_logits_stay_finite():
    """A word that is only copied, one that is only generated, and attention that vanishes."""
    states = torch.zeros(7, DIM, requires_grad=True)
    weight = torch.zeros(WORDS, DIM, requires_grad=True)
    bias = torch.tensor([0.0] * 5 + [300.0, -300.0, -300.0] + [0.0] * 3, requires_grad=True)
    for gate_value in (-80.0, 0.0, 80.0):
        gate = torch.full((7,), gate_value, requires_grad=True)
        scores = torch.zeros(7, 6)
        scores[:, 2] = -300.0
        scores.requires_grad_()
        loss, nll = vocabulary_losses(states, weight, bias, TARGETS, 0.1, 1.0, copying(gate, scores))
        grads = torch.autograd.grad(loss, (states, weight, bias, gate, scores))
        assert all(x.isfinite().all() for x in (loss, nll, *grads))
        log_p = mixed(F.linear(states, weight, bias), copying(gate, scores))
        assert log_p.exp().sum(1).allclose(torch.ones(7), rtol=1e-4)


OPTIONS = [{"copy": True}, {"emotion_start": True}, {"copy": True, "emotion_start": True, "strategy": "hard"}]


@pytest.mark.parametrize("options", [*OPTIONS, {"copy": True, "strategy": "none"}])
def test_the_loss_scores_what_forward_says(make, options):
    model, batch = make.model(**options), make.batch()
    batch.context[3, 1 : batch.lengths[3]] = UNK  # nothing to copy
    logits = model(batch).logits
    log_p = logits.log_softmax(-1)
    if model.config.copy:
        torch.testing.assert_close(logits, log_p)
    nll = -log_p.gather(2, batch.response[..., None])[..., 0] * (batch.response != PAD)
    torch.testing.assert_close(model.score(batch).nll.float(), nll.sum(1))


def test_copying_is_of_the_context_alone(make):
    """Neither related words nor special ones; and more padding changes nothing."""
    model, batch = make.model(copy=True), make.batch()
    encoding = model.encode(batch)
    for row in range(len(batch.context)):
        allowed = encoding.copyable.words[row][encoding.copyable.allowed[row]].tolist()
        assert allowed == [
            word for word in batch.context[row].tolist() if word not in (PAD, UNK, BOS, EOS, CLS)
        ]
    torch.testing.assert_close(model.score(make.padded(batch, 3)).nll, model.score(batch).nll)


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_say_what_forward_says(make, options):
    """One by one, in beams, on fewer contexts and on a graph's cache, with words like the forward's."""
    model, batch = make.model(**options), make.batch()
    wanted = model(batch).logits.log_softmax(-1)
    words = torch.cat([torch.full((len(batch.response), 1), BOS), batch.response[:, :-1]], dim=1)
    with torch.inference_mode():
        cache = model.start(model.encode(batch), words.shape[1])
        static, keep = None, torch.tensor([2, 0])
        for t in range(words.shape[1]):
            if t == 1:
                static = StaticCache(cache)
            if t == 3:
                cache.select(keep)
                cache.branch(torch.zeros(2, 2, dtype=torch.int64))
            rows = torch.arange(4) if t < 3 else keep.repeat_interleave(2)
            logits = model.step(words[rows, t], cache)
            torch.testing.assert_close(logits.log_softmax(-1), wanted[rows, t].detach(), rtol=1e-4, atol=1e-5)
            if static is not None:
                logits = model.step(words[:, t], static)
                torch.testing.assert_close(
                    logits.log_softmax(-1), wanted[:, t].detach(), rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_generates(make, method):
    model = make.model(copy=True, emotion_start=True)
    answers = generate(model, make.batch(), Decoding(method=method, max_length=5, seed=1))
    assert all(1 <= len(answer) <= 5 for answer in answers)


def test_a_model_learns_to_copy(make):
    """Answers that repeat a word of the context, a new one each time: only copying can foresee them."""
    finals = {}
    for copy in (False, True):
        model = make.model(copy=copy, dropout=0.0, graph_dropout=0.0).train()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(150):
            batch = make.batch(rows=8, response=2, seed=step)
            response = torch.stack([batch.context[:, 1], torch.full((8,), EOS)], 1)
            loss = model.loss(batch._replace(response=response))
            loss.total.backward()
            optimizer.step()
            optimizer.zero_grad()
        finals[copy] = float(loss.nll / loss.tokens)
    assert finals[True] < 0.5 * finals[False], finals


def test_the_start_is_the_emotions(make):
    """W h^m + b stands for BOS's vector, learns from the responses, and not where gen-loss is left out."""
    batch = make.batch()
    model = make.model(emotion_start=True)
    encoding = model.encode(batch)
    embedded = model.embedding.place(model.embedding.look_up(batch.response[:, :1])[0])
    states = model._decode(model.embedding.look_up(batch.response[:, :1])[0], encoding).states
    first = encoding.perceived.main_logits @ model.start_word.weight.T + model.start_word.bias
    direct = model.decoder(
        model.embedding.place(first[:, None]), encoding.memory, encoding.memory_mask, encoding.guidance
    ).states
    torch.testing.assert_close(states, direct)
    assert not torch.allclose(embedded, model.embedding.place(first[:, None]))
    for ablations, learns in (((), True), (("gen-loss",), False)):
        model = make.model(emotion_start=True, ablations=ablations)
        model.loss(batch).generation.backward()
        assert model.start_word.weight.grad.abs().sum() > 0
        grad = model.perceiver.perceptron.main.weight.grad
        assert learns == (grad is not None and bool(grad.abs().sum() > 0))


def test_settings():
    config = ModelConfig(copy=True, emotion_start=True)
    assert from_dict(ModelConfig, to_dict(config)) == config
    earlier = {k: v for k, v in to_dict(ModelConfig()).items() if k not in ("copy", "emotion_start")}
    assert from_dict(ModelConfig, earlier) == ModelConfig()
    with pytest.raises(InputError, match="emotion_start"):
        ModelConfig(strategy="none", emotion_start=True)


def test_low_precision_is_close(make):
    model, batch = make.model(copy=True), make.batch()
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(batch)
    low.total.backward()
    assert math.isclose(low.total.item(), model.loss(batch).total.item(), rel_tol=2e-2)
    assert model.pointer.gate.weight.grad.isfinite().all()
