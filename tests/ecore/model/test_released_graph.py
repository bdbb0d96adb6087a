"""The graph form of the released code against its formulas, written out node by node in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from ecore import pretrained
from ecore.config import PRESETS, ModelConfig, from_dict, to_dict
from ecore.errors import InputError
from ecore.model import ECore
from ecore.model.losses import ranked_pairs_loss
from ecore.model.perceiver import SOFT_RELEVANT
from ecore_kernels import otsu

both_strategies = pytest.mark.parametrize("strategy", ["soft", "hard"])
SIGNALS = ("global_signal", "main_logits", "emotion_attention", "guidance")


def released(make, **settings) -> ECore:
    """A model in float64 whose numbers are of the size that trained ones have."""
    model = make.model(graph_form="released", **settings).double()
    with torch.no_grad():
        model.embedding.word.weight.mul_(4.0)
        model.emotion_table.mul_(3.0)
        model.intensity.mul_(2.0)  # up to 0.5, so that c and its square differ by much
        for layer in getattr(model.perceiver.graph_network, "layers", ()):
            layer.gate.bias.fill_(0.3)
            layer.value.bias.copy_(torch.linspace(-0.5, 0.5, 24))
    return model


def by_hand(model: ECore, ids: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """One context without padding, [M] ids with [CLS] first; ``mean`` of h_X, [D]."""
    config, network = model.config, model.perceiver.graph_network
    c = model.intensity[ids]
    words, emotions = len(ids), len(model.emotion_table)
    s = model.perceiver.correlation.factor
    r = (s.T @ s).softmax(1)
    h0 = torch.cat([model.embedding.word.weight[ids] * math.sqrt(config.dim), model.emotion_table])

    def initial(i: int, j: int, of_emotions: Tensor | None) -> Tensor:
        if j == 0:
            return torch.ones(())
        if j >= words:
            if of_emotions is not None:
                return of_emotions[j - words]
            return torch.tensor(1.0 / emotions) if i < words else r[i - words, j - words]
        return c[j] ** 2 if i < words else torch.zeros(())

    def hears(i: int, j: int, threshold: float, relevant: Tensor | None) -> bool:
        for node in (i, j):
            if 0 < node < words and c[node] < threshold:
                return False
            if node >= words and relevant is not None and not relevant[node - words]:
                return False
        if i >= words:
            return j == 0 or (j >= words and j != i)
        return i == 0 or j <= i or j >= words

    def run(of_emotions: Tensor | None, relevant: Tensor | None) -> tuple[Tensor, Tensor]:
        nodes, size = h0, config.dim // len(config.thresholds)
        total = len(nodes)
        first = torch.stack(
            [torch.stack([initial(i, j, of_emotions) for j in range(total)]) for i in range(total)]
        )
        edges = [first for _ in config.thresholds]
        for layer in network.layers:
            query, key, value = (f(nodes) for f in (layer.query, layer.key, layer.value))
            outputs = []
            for k, threshold in enumerate(config.thresholds):
                part = slice(k * size, (k + 1) * size)
                q, ks, v = query[:, part], key[:, part], value[:, part]
                gate = v @ layer.gate.weight[0] + layer.gate.bias  # of the sender's value
                x = (q @ ks.T) * gate[None, :] * edges[k]
                rows = []
                for i in range(total):
                    heard = [j for j in range(total) if hears(i, j, threshold, relevant)]
                    rows.append(x[i, heard].softmax(0) @ v[heard] if heard else torch.zeros(size))
                outputs.append(torch.stack(rows))
                edges[k] = layer.edge_scale * (edges[k] + x) + layer.edge_bias  # of all pairs
            nodes = torch.cat(outputs, 1)
            for mlp in layer.mlps:
                nodes = torch.relu(nodes @ mlp[0].weight.T) @ mlp[3].weight.T
        return nodes, sum(edges)

    _, edge = run(None, None)
    x = edge[:words, words:].sum(0)
    signal = x + torch.stack([(x * edge[words:, words + j]).sum() for j in range(emotions)])
    perceptron = model.perceiver.perceptron
    both = torch.cat([signal, perceptron.context(mean)])
    main = perceptron.main(both)
    attention = torch.sigmoid(perceptron.gate(both)) * main + main
    if config.strategy == "soft":
        nodes, _ = run(torch.relu(attention).softmax(0), None)
    else:
        nodes, _ = run(None, otsu(attention[None].float(), config.max_relevant).mask[0])
    return dict(zip(SIGNALS, (signal, main, attention, nodes[:words].sum(0)), strict=True))


@both_strategies
@pytest.mark.parametrize("layers, thresholds", [(1, (0.0, 0.2)), (2, (0.0, 0.075, 0.15)), (3, (0.0, 0.2))])
def test_the_formulas(make, strategy, layers, thresholds):
    """Signals and node sums, and the gradients of all that they depend on."""
    model = released(make, strategy=strategy, graph_layers=layers, thresholds=thresholds)
    batch = make.batch(rows=3, words=7)
    encoding, context = model.encode_words(batch)
    perceived = model.perceive(encoding, context).perceived
    rows = [
        by_hand(model, ids[:length], mean)
        for ids, length, mean in zip(batch.context, batch.lengths, context.mean, strict=True)
    ]
    expected = {name: torch.stack([row[name] for row in rows]) for name in SIGNALS}
    for name in SIGNALS:
        # The soft weights are rounded to float32 on their way, whatever the model's type.
        tolerance = 1e-5 if name == "guidance" else 1e-9
        torch.testing.assert_close(getattr(perceived, name), expected[name], rtol=tolerance, atol=tolerance)
    parameters = {
        n: p for n, p in model.named_parameters() if n.startswith(("perceiver.", "embedding.", "emotion_t"))
    }
    gradients = []
    for results in (perceived._asdict(), expected):
        torch.manual_seed(1)
        total = sum(
            (torch.randn(3, expected[n].shape[1]).double() * results[n] / expected[n].detach().std()).sum()
            for n in SIGNALS
        )
        gradients.append(
            torch.autograd.grad(total, list(parameters.values()), allow_unused=True, retain_graph=True)
        )
    compared = set()
    for name, actual, wanted in zip(parameters, *gradients, strict=True):
        if wanted is None:
            continue
        compared.add(name)
        bound = 1e-5 * float(wanted.abs().max()) + 1e-12
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
    assert {"emotion_table", "perceiver.correlation.factor", "perceiver.perceptron.gate.weight"} <= compared
    for name in ("edge_scale", "edge_bias", "gate.weight", "query.bias", "mlps.1.3.weight"):
        assert f"perceiver.graph_network.layers.{layers - 1}.{name}" in compared


@torch.no_grad()
@both_strategies
def test_padding_changes_nothing(make, strategy):
    model, batch = released(make, strategy=strategy), make.batch()
    plain, wide = model.encode(batch).perceived, model.encode(make.padded(batch, 5)).perceived
    for name in SIGNALS:
        torch.testing.assert_close(getattr(wide, name), getattr(plain, name), rtol=1e-6, atol=1e-9)


def test_its_pairs_are_ranked_and_not_divided():
    weight = torch.arange(25.0).reshape(5, 5)
    attention = torch.tensor([[0.1, 3.0, 2.0, -1.0, 5.0], [9.0, 1.0, 4.0, 8.0, 0.0]])
    # 4 > 1 > 2, and 0 > 3 > 2: the row is the emotion with more attention.
    pairs = [weight[4, 1] + weight[4, 2] + weight[1, 2], weight[0, 3] + weight[0, 2] + weight[3, 2]]
    assert ranked_pairs_loss(weight, attention, 3) == -(pairs[0] + pairs[1]) / 2
    assert ranked_pairs_loss(weight, attention, 9) < ranked_pairs_loss(weight, attention, 1) == 0.0


@both_strategies
def test_the_loss_is_the_forms_own(make, strategy):
    model, batch = released(make, strategy=strategy), make.batch()
    losses = model.loss(batch, health=True)
    s = model.perceiver.correlation.factor
    r = (s.T @ s).softmax(1)  # its diagonal is S's own
    order = model.encode(batch).perceived.emotion_attention.sort(descending=True).indices[:, :SOFT_RELEVANT]
    expected = -sum(r[a, b] + r[a, c] + r[b, c] for a, b, c in order) / len(order)
    torch.testing.assert_close(losses.correlation, expected)
    torch.testing.assert_close(losses.total, losses.generation + losses.emotion + losses.correlation)
    assert losses.health["perception_context"] > 0.0
    losses.total.backward()
    silent = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert {n for n in silent if n.startswith(("perceiver.", "emotion_table"))} == (
        {f"perceiver.perceptron.gate.{n}" for n in ("weight", "bias")} if strategy == "hard" else set()
    )


@pytest.mark.parametrize("ablation", ["graph", "co-p", "co-g", "co-loss", "gate-g", "gen-loss"])
@both_strategies
def test_ablations(make, strategy, ablation):
    model, batch = released(make, strategy=strategy, ablations=(ablation,)), make.batch()
    losses, perceived = model.loss(batch), model.encode(batch).perceived
    assert losses.total.isfinite()
    if ablation == "co-g":
        torch.testing.assert_close(perceived.guidance, model.emotion_table[perceived.main_logits.argmax(1)])
    if ablation == "gate-g":
        assert torch.equal(perceived.emotion_attention, perceived.main_logits)
    if ablation == "graph":
        edges = model.perceiver.correlation().softmax(1)
        before = model.perceiver.graph_network(
            model.encode(batch).memory[:, : batch.context.shape[1]], batch.context != 0, model.emotion_table
        )
        torch.testing.assert_close(perceived.global_signal, before + before @ edges)


@torch.no_grad()
def test_it_starts_as_xavier_says_and_without_norms(make):
    """Bounds of the uniform distribution: of all matrices, the emotions' table and S."""
    model = make.model(graph_form="released")
    parts = {n: p for n, p in model.named_parameters() if n.startswith(("perceiver.", "emotion_table"))}
    assert not any("norm" in name for name in parts)
    assert not any("norm" in name for name, _ in model.decoder.named_parameters() if "guidance" in name)
    for name, weight in parts.items():
        if weight.dim() == 2:
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.5 * bound < weight.abs().max() <= bound, name


@torch.no_grad()
def test_it_travels(make, tmp_path):
    model, batch = make.model(graph_form="released"), make.batch()
    pretrained.save(model, tmp_path)
    loaded = pretrained.load(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(batch).logits, model(batch).logits)


def test_older_configs_are_of_the_papers_form():
    written = to_dict(PRESETS["released"][0])
    assert written.pop("graph_form") == "released"
    assert from_dict(ModelConfig, written).graph_form == "paper"
    for field in ("graph_form", "emotion_table"):
        with pytest.raises(InputError, match=f"{field}: of no use with a backbone"):
            ModelConfig(backbone="gpt2", **{field: "released" if field == "graph_form" else True})


@torch.no_grad()
def test_a_table_of_emotions_is_a_setting_of_its_own(make):
    """In the paper's form, too; and words in the released one."""
    batch = make.batch()
    for form, table in (("paper", True), ("released", False)):
        model = make.model(graph_form=form, emotion_table=table)
        assert (model.emotion_table is not None) == table
        seen = []
        network = model.perceiver.graph_network
        perceive = network.perceive
        network.perceive = lambda words, emotions, graph, p=perceive, s=seen: (
            s.append(emotions) or p(words, emotions, graph)
        )
        model.encode(batch)
        own = model.embedding.word.weight[model.emotion_words] * 24**0.5
        torch.testing.assert_close(seen[0], model.emotion_table if table else own)
    assert make.model().emotion_table is None
    assert dataclasses.replace(model.config, emotion_table=None).own_emotions


def test_dropout_is_on_attention_and_in_the_mlps_while_training(make):
    """Two passes of one batch differ in training, and not in eval mode or without graph_dropout."""
    batch = make.batch()
    for share, differ in ((0.4, True), (0.0, False)):
        model = make.model(graph_form="released", graph_dropout=share, dropout=0.0)
        with torch.no_grad():
            assert torch.equal(model.encode(batch).guidance, model.encode(batch).guidance)
            model.train()
            signals = [model.encode(batch).guidance for _ in range(2)]
        assert torch.equal(*signals) != differ
        layer, seen = model.perceiver.graph_network.layers[0], []
        layer.mlps.register_forward_pre_hook(lambda _, inputs, s=seen: s.append(inputs[0].detach()))
        with torch.no_grad():
            model.encode(batch), model.encode(batch)
        assert torch.equal(seen[0], seen[2]) != differ  # the first passes: what attention alone gives
