"""The perceptron, the correlation and the losses against their equations, with numbers worked out here."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from ecore.config import PRESETS, ModelConfig
from ecore.model import ECore
from ecore.model.dropout import Dropout
from ecore.model.graph_network import Correlation
from ecore.model.losses import correlation_loss, vocabulary_losses
from ecore.model.perceiver import health
from ecore.model.perceptron import Perceptron
from ecore_kernels.reference_kernels.linear_cross_entropy import CHUNK

CONFIG = ModelConfig(dim=6, heads=2)


# Perceptron (Eqs. 8, 9, 12) ---------------------------------------------------------------------------------


FORMS = {
    "own weight": {},
    "whole row": {"own_weight": False},
    "letter": {"graph_norm": False},
}
"""Forms of Eq. 8's aggregation: the present one, older runs', the paper's."""


@pytest.mark.parametrize("form", FORMS)
def test_eq_8_by_hand(form):
    """h^g_i = sum_j E^{e-e}_ij (sum of E^{w-e})_j: row i receives from j, and the diagonal is 1."""
    to_emotion = torch.tensor([[1.0, 10.0, 100.0]])
    between = torch.tensor([[[9.0, -0.2, 0.3], [0.4, 9.0, 0.6], [-0.7, 1.8, 9.0]]])
    perceptron = Perceptron(dataclasses.replace(CONFIG, **FORMS[form]), 3)
    expected = {
        "letter": [[1 - 2 + 30, 0.4 + 10 + 60, -0.7 + 18 + 100]],
        "whole row": [[(1 - 2 + 30) / 1.5, (0.4 + 10 + 60) / 2.0, (-0.7 + 18 + 100) / 3.5]],
        # The last row alone hears more than 1 from others, 2.5.
        "own weight": [[1 - 2 + 30, 0.4 + 10 + 60, (-0.7 + 18) / 2.5 + 100]],
    }
    signal = perceptron(to_emotion, between, torch.zeros(1, 6)).global_signal
    torch.testing.assert_close(signal, torch.tensor(expected[form]))


def test_no_emotion_drowns_the_others():
    """An emotion with edges of 10^4 leaves h^g telling contexts apart; in the letter nothing else is left of it."""
    to_emotion, between = torch.randn(64, 8), torch.rand(8, 8) * 0.1
    between[5] = 1e4 * torch.rand(8)
    largest = {}
    for form, settings in FORMS.items():
        perceptron = Perceptron(dataclasses.replace(CONFIG, **settings), 8)
        signal = perceptron(to_emotion, between.expand(64, 8, 8), torch.zeros(64, 6)).global_signal
        largest[form] = F.layer_norm(signal, (8,)).abs().amax(1).mean()
    assert largest["letter"] > 2.6  # a single 1 among zeros has 7**0.5 after a LayerNorm
    assert largest["whole row"] < 2.3
    assert largest["own weight"] < 2.3


def test_an_emotion_keeps_its_own_weight():
    """h^g still differs between contexts, as its own terms do, when row gates make all edges large and alike."""
    to_emotion = torch.randn(64, 8) + 1.5
    gates = torch.linspace(-300.0, 300.0, 8)[:, None]
    between = (gates * (1.0 + torch.rand(8))).expand(64, 8, 8)
    shares = {}
    for form, settings in FORMS.items():
        perceptron = Perceptron(dataclasses.replace(CONFIG, **settings), 8)
        signal = perceptron(to_emotion, between, torch.zeros(64, 6)).global_signal
        shares[form] = F.layer_norm(signal, (8,)).var(0, correction=0).mean()
    assert shares["own weight"] > 0.2
    assert shares["whole row"] < 0.05
    assert shares["letter"] < 0.05


@pytest.mark.parametrize("graph_norm", [True, False])
def test_eqs_9_and_12_by_hand(graph_norm):
    perceptron = Perceptron(ModelConfig(dim=6, heads=2, graph_norm=graph_norm), 3)
    to_emotion, context = torch.randn(4, 3), torch.randn(4, 6)
    perception = perceptron(to_emotion, torch.zeros(4, 3, 3), context)
    assert torch.equal(perception.global_signal, to_emotion)  # the diagonal alone
    signal = to_emotion
    if graph_norm:
        centred = signal - signal.mean(1, keepdim=True)
        signal = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    w_x, w_main, w_gate = perceptron.context, perceptron.main, perceptron.gate
    both = torch.cat([signal, context @ w_x.weight.T + w_x.bias], 1)
    main = both @ w_main.weight.T + w_main.bias
    gate = 1 / (1 + torch.exp(-(signal @ w_gate.weight.T + w_gate.bias)))
    torch.testing.assert_close(perception.main_logits, main)
    torch.testing.assert_close(perception.gate, gate)
    torch.testing.assert_close(perception.emotion_attention, gate * main + main)


# Correlation (R and Eq. 18) ---------------------------------------------------------------------------------


def test_r_is_symmetric_with_a_diagonal_of_one():
    correlation = Correlation(4)
    s, r = correlation.factor.detach(), correlation().detach()
    for i in range(4):
        for j in range(4):
            expected = 1.0 if i == j else float(s[:, i] @ s[:, j])
            assert float(r[i, j]) == pytest.approx(expected, abs=1e-6)


def test_s_starts_with_variance_one_over_p():
    assert Correlation(400).factor.std().item() == pytest.approx(400**-0.5, rel=0.02)


@pytest.fixture
def correlation():
    """S of three emotions: columns (1, 0), (1, 1), (0, 2) and a row of zeros."""
    module = Correlation(3)
    with torch.no_grad():
        module.factor.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]))
    return module


# R has rows (1, 1, 0), (1, 1, 2), (0, 2, 1).
ROW_0, ROW_1 = 2 * math.e + 1, 2 * math.e + math.e**2
PAIRS = {
    "inner": {(0, 1): 1.0, (0, 2): 0.0, (1, 2): 2.0},
    "softmax": {(0, 1): math.e / ROW_0, (0, 2): 1 / ROW_0, (1, 2): math.e**2 / ROW_1},
    "cosine": {(0, 1): 0.5**0.5, (0, 2): 0.0, (1, 2): 0.5**0.5},
}


@pytest.mark.parametrize("form", PAIRS)
def test_eq_18_by_hand(correlation, form):
    pair, weight = PAIRS[form], correlation.pair_weight(form)
    sets = [
        ([True, True, True], -(pair[0, 1] + pair[0, 2] + pair[1, 2]) / 3),
        ([True, False, True], -pair[0, 2] / 2),
        ([False, True, True], -pair[1, 2] / 2),
        ([False, True, False], 0.0),
        ([False, False, False], 0.0),
    ]
    for relevant, expected in sets:
        loss = correlation_loss(weight, torch.tensor([relevant]))
        assert loss.item() == pytest.approx(expected, abs=1e-6)
    together = correlation_loss(weight, torch.tensor([relevant for relevant, _ in sets]))
    assert together.item() == pytest.approx(sum(x for _, x in sets) / len(sets), abs=1e-6)


@pytest.mark.parametrize("form", ["softmax", "cosine"])
def test_bounded_forms_are_bounded(form):
    module = Correlation(8)
    with torch.no_grad():
        module.factor.mul_(100.0)
    loss = correlation_loss(module.pair_weight(form), torch.ones(1, 8, dtype=torch.bool))
    assert loss.abs() <= 28 / 8 + 1e-5


def test_the_correlation_loss_is_float32_under_autocast():
    relevant = torch.rand(5, 8) > 0.4
    weight = Correlation(8).pair_weight("softmax")
    with torch.autocast("cpu", torch.bfloat16):
        low = correlation_loss(weight, relevant)
    assert low.item() == pytest.approx(correlation_loss(weight, relevant).item(), rel=1e-6)


# Generation and joint loss (Eqs. 11, 17, 19) ----------------------------------------------------------------


@pytest.mark.parametrize("words", [0, 1, 9, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_vocabulary_losses(words, smoothing):
    """As torch's own, with all gradients; words that are padding count nothing."""
    states, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((words, 5), (13, 5), (13,))
    )
    targets = torch.randint(0, 13, (words,))
    total, nll = vocabulary_losses(states, weight, bias, targets, smoothing, scale=0.25)
    gradients = torch.autograd.grad(3.0 * total, (states, weight, bias))

    logits = F.linear(states, weight, bias)
    options = {"ignore_index": 0, "reduction": "none"}
    wanted = 0.25 * F.cross_entropy(logits, targets, label_smoothing=smoothing, **options).sum()
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets, **options))
    torch.testing.assert_close(gradients, torch.autograd.grad(3.0 * wanted, (states, weight, bias)))
    assert not nll.requires_grad


def test_vocabulary_losses_of_unlikely_words_stay_finite():
    states = torch.tensor([[200.0, 0.0]], requires_grad=True)
    total, nll = vocabulary_losses(states, torch.eye(2), torch.zeros(2), torch.tensor([1]))
    total.backward()
    assert nll.item() == total.item() == 200.0
    assert torch.equal(states.grad, torch.tensor([[1.0, -1.0]]))


def test_vocabulary_losses_compile_without_a_graph_break():
    states, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((7, 5), (13, 5), (13,)))

    def loss(states, targets):
        return vocabulary_losses(torch.tanh(states), weight, bias, targets, 0.1, scale=1.0 / len(states))[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for words in (7, 4):
        targets = torch.randint(0, 13, (words,))
        got, wanted = compiled(states[:words], targets), loss(states[:words], targets)
        torch.testing.assert_close(got, wanted)
        gradients = torch.autograd.grad(got, (states, weight, bias))
        torch.testing.assert_close(gradients, torch.autograd.grad(wanted, (states, weight, bias)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vocabulary_losses_under_autocast(dtype):
    """Products in the low precision, everything else in float32."""
    states, weight = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    bias, targets = torch.randn(50, requires_grad=True), torch.randint(1, 50, (300,))
    with torch.autocast("cpu", dtype):
        total, nll = vocabulary_losses(states, weight, bias, targets, 0.1)
    exact, exact_nll = vocabulary_losses(states, weight, bias, targets, 0.1)
    assert total.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(nll, exact_nll, rtol=0.02, atol=0.1)
    ours, wanted = (torch.autograd.grad(x, (states, weight, bias)) for x in (total, exact))
    assert all(x.dtype == torch.float32 for x in ours)
    for one, other in zip(ours, wanted, strict=True):
        assert (one - other).abs().max() < 0.03 * other.abs().max()


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout(p):
    """The share that is dropped, the scale of the rest, the same mask in the gradient, other masks next time."""
    layer, x = Dropout(p), torch.full((199_999,), 3.0, requires_grad=True)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    dropped = first == 0.0
    assert dropped.double().mean().item() == pytest.approx(p, abs=0.005)
    torch.testing.assert_close(
        first[~dropped], torch.full_like(first[~dropped], 3.0 / (1.0 - p)), rtol=1e-3, atol=0
    )
    assert ((second == 0.0) & dropped).double().mean().item() == pytest.approx(p * p, abs=0.005)
    assert (dropped[1:] & dropped[:-1]).double().mean().item() == pytest.approx(p * p, abs=0.005)
    first.sum().backward()
    torch.testing.assert_close(x.grad, first.detach() / 3.0)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("more", [0, 5])
def test_the_loss_needs_no_count_of_words(make, more):
    """Told how many words there are, or only that there are no more than that, nothing changes."""
    model, batch = make.model(), make.batch()
    tokens = int((batch.response != 0).sum()) + more
    for given, counted in zip(model.loss(batch, tokens=tokens), model.loss(batch), strict=True):
        if isinstance(given, torch.Tensor):
            torch.testing.assert_close(given, counted)
    torch.testing.assert_close(model.score(batch, tokens).nll, model.score(batch).nll)


@pytest.mark.parametrize("strategy", ["soft", "hard"])
def test_the_losses_are_their_equations(make, strategy):
    model = make.model(strategy=strategy, gamma_emotion=0.7, gamma_correlation=1.9)
    batch = make.batch()
    losses, (logits, encoding) = model.loss(batch), model(batch)
    rows = len(batch.response)
    kinds = {"ignore_index": 0, "reduction": "sum"}
    generation = (
        F.cross_entropy(logits.flatten(0, 1), batch.response.flatten(), label_smoothing=0.1, **kinds) / rows
    )
    nll = F.cross_entropy(logits.flatten(0, 1), batch.response.flatten(), **kinds)
    emotion = (
        -sum(encoding.perceived.main_logits[b].log_softmax(0)[batch.emotion[b]] for b in range(rows)) / rows
    )
    pairs = model.perceiver.correlation().softmax(-1)
    correlation = 0.0
    for b in range(rows):
        chosen = encoding.perceived.relevant[b].nonzero()[:, 0].tolist()
        correlation -= sum(pairs[i, j] for i in chosen for j in chosen if i < j) / len(chosen) / rows
    torch.testing.assert_close(losses.generation, generation)
    torch.testing.assert_close(losses.emotion, emotion)
    torch.testing.assert_close(losses.correlation, correlation)
    torch.testing.assert_close(losses.total, generation + 0.7 * emotion + 1.9 * correlation)
    torch.testing.assert_close(losses.nll, nll)
    assert losses.tokens.item() == int((batch.response != 0).sum())
    assert losses.correct.item() == int((encoding.perceived.main_logits.argmax(1) == batch.emotion).sum())
    assert losses.health == {}
    assert not losses.nll.requires_grad


@torch.no_grad()
def test_the_predicted_emotion_is_the_highest_of_h_m(make):
    """Of h^m and not of h_emo: a gate that is shut for the likeliest emotion does not count."""
    model, batch = make.model(), make.batch()
    model.perceiver.perceptron.main.bias.fill_(9.0)
    model.perceiver.perceptron.main.bias[2] = 12.0
    model.perceiver.perceptron.gate.bias.fill_(9.0)
    model.perceiver.perceptron.gate.bias[2] = -9.0
    encoding = model.encode(batch)
    assert (encoding.perceived.main_logits.argmax(1) == 2).all()
    assert (encoding.perceived.emotion_attention.argmax(1) != 2).all()
    assert model.loss(batch._replace(emotion=torch.full((4,), 2))).correct == 4


@torch.no_grad()
def test_score_is_the_sum_of_log_probabilities(make):
    model, batch = make.model(), make.batch()
    scores = model.score(batch)
    logits = model(batch).logits.double()
    for b, response in enumerate(batch.response):
        words = response[response != 0]
        expected = -sum(logits[b, t].log_softmax(0)[word] for t, word in enumerate(words))
        assert scores.nll[b].item() == pytest.approx(expected.item(), rel=1e-6)
        assert scores.tokens[b].item() == len(words)


def test_the_correlation_loss_moves_r_alone(make):
    """V' is a choice, not a differentiable one."""
    model = make.model()
    model.loss(make.batch()).correlation.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {"perceiver.correlation.factor"}


# Health at the start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["soft", "hard"])
@torch.no_grad()
def test_a_new_model_is_healthy(make, strategy):
    """The paper's sizes: the perceived signal is small and the emotion loss that of a guess."""
    vocabulary = make.vocabulary(100, tuple(f"emotion{i}" for i in range(32)))
    config = dataclasses.replace(PRESETS["paper"][0], strategy=strategy)
    model = ECore(config, vocabulary, make.tables(vocabulary))
    losses = model.loss(make.random_batch(vocabulary, rows=8, words=40, response=10), health=True)
    assert losses.health["perception_std"] < 10
    assert losses.emotion.item() == pytest.approx(math.log(32), abs=1.0)
    assert 0 < losses.health["dead_edges"] < 1
    assert losses.health["gate_mean"].item() == pytest.approx(0.5, abs=0.2)
    assert losses.health["gate_std"] > 0
    assert losses.health["relevant"] == 3 if strategy == "soft" else 1 <= losses.health["relevant"] <= 5


@torch.no_grad()
def test_health_by_hand(make):
    model, batch = make.model(), make.batch()
    health, encoding = model.loss(batch, health=True).health, model.encode(batch)
    dead = [
        float(model.intensity[word]) == 0.0
        for context, length in zip(batch.context, batch.lengths, strict=True)
        for word in context[1:length]
    ]
    assert health["dead_edges"].item() == pytest.approx(sum(dead) / len(dead))
    torch.testing.assert_close(health["perception_std"], encoding.perceived.global_signal.std())
    assert 0 < health["perception_context"] < 1
    torch.testing.assert_close(health["gate_mean"], encoding.perceived.gate.mean())
    torch.testing.assert_close(health["gate_std"], encoding.perceived.gate.std())


@torch.no_grad()
def test_a_signal_that_is_the_same_for_every_context_shows(make):
    model, batch = make.model(), make.batch()
    perceived, intensity = model.encode(batch).perceived, model.context_intensity(batch)
    signal = perceived.global_signal
    drowned = 1e6 * signal[:1] + signal
    found = health(perceived._replace(global_signal=drowned), intensity, batch.lengths)
    assert found["perception_context"] < 1e-6
    opposite = 1e6 * torch.stack([signal[0], -signal[0]])
    found = health(perceived._replace(global_signal=opposite), intensity, batch.lengths)
    assert found["perception_context"].item() == pytest.approx(1.0, abs=1e-4)
