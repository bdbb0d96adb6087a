"""Properties that their own code lacks, for each baseline: padding changes nothing, a batch decodes as its rows do."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
import torch

from ecore import cli, hub, pipeline, pretrained
from ecore.baselines import BASELINES
from ecore.config import BASELINES as SETTINGS
from ecore.config import PRESETS, ModelConfig, TrainingConfig, for_model
from ecore.data.vocabulary import BOS
from ecore.errors import InputError
from ecore.training.trainer import train
from tests.ecore.model.test_padding import assert_same, assert_same_encoding
from tests.ecore.training.conftest import TINY
from tests.sizes import TINY_MODEL

every_baseline = pytest.mark.parametrize("name", BASELINES)
LOSSES = ("total", "generation", "emotion", "nll")


def test_each_setting_has_its_class():
    assert set(BASELINES) == set(SETTINGS)


@every_baseline
@torch.no_grad()
def test_more_padding_changes_nothing(make, name):
    model, batch = make.model(name).double(), make.batch(name)
    wider = make.padded(batch, 9)
    output, other = model(batch), model(wider)
    real = batch.response != 0
    assert_same(other.logits[:, : batch.response.shape[1]][real], output.logits[real])
    assert_same_encoding(other.encoding, output.encoding)
    assert_same(model.score(wider).nll, model.score(batch).nll)
    losses, wider_losses = model.loss(batch, health=True), model.loss(wider, health=True)
    for part in LOSSES:
        assert_same(getattr(wider_losses, part), getattr(losses, part))
    for part, value in losses.health.items():
        assert_same(wider_losses.health[part], value)


@every_baseline
@torch.no_grad()
def test_a_batch_of_one_is_its_row(make, name):
    model, batch = make.model(name).double(), make.batch(name)
    output, scores = model(batch), model.score(batch)
    for row in range(4):
        alone = make.rows(batch, [row])
        words = alone.response.shape[1]
        single = model(alone)
        assert_same(single.logits[0], output.logits[row, :words])
        assert_same(model.score(alone).nll[0], scores.nll[row])
        assert_same(single.encoding.perceived.main_logits[0], output.encoding.perceived.main_logits[row])


@every_baseline
def test_packed_responses_have_the_losses_and_gradients_of_padded_ones(make, name):
    """Also with more rows than words, as a recorded step has them."""
    batch, found = make.batch(name), []
    words, places = int((batch.response != 0).sum()), batch.response.numel()
    assert words + 3 < places
    for tokens in (places, None, words + 3):  # the first is not packed
        model = make.model(name, dropout=0.0, graph_dropout=0.0).double().train()
        rows = Counter()
        model.decoder.blocks[0].feed_forward.register_forward_pre_hook(
            lambda _, x, seen=rows: seen.update([x[0].shape[:-1].numel()])
        )
        torch.manual_seed(1)  # MIME draws
        losses = model.loss(batch, health=True, tokens=tokens)
        losses.total.backward()
        assert rows == {places if tokens == places else (tokens or words) + 1: 1}
        found.append((losses, {weight: p.grad for weight, p in model.named_parameters()}))
    padded, gradients = found[0]
    for packed, others in found[1:]:
        for part in LOSSES:
            torch.testing.assert_close(getattr(packed, part), getattr(padded, part), rtol=2e-7, atol=0.0)
        assert packed.health.keys() == padded.health.keys()
        for part, value in padded.health.items():
            torch.testing.assert_close(packed.health[part], value, rtol=2e-7, atol=0.0, msg=part)
        for weight, gradient in gradients.items():
            torch.testing.assert_close(others[weight], gradient, rtol=2e-7, atol=1e-12, msg=weight)


@every_baseline
@torch.no_grad()
def test_cached_logits_are_forwards(make, name):
    model, batch = make.model(name).double(), make.batch(name)
    output = model(batch)
    words = torch.cat([torch.full((4, 1), BOS), batch.response[:, :-1]], 1)
    cache = model.start(output.encoding, 7)
    stepped = torch.stack([model.step(words[:, t], cache) for t in range(7)], 1)
    torch.testing.assert_close(stepped.log_softmax(-1), output.logits.log_softmax(-1))
    real = batch.response != 0
    nll = -output.logits.log_softmax(-1).gather(2, batch.response[..., None])[..., 0]
    torch.testing.assert_close(model.score(batch).nll, (nll * real).sum(1))


@every_baseline
@pytest.mark.parametrize("decoding", [{}, {"method": "beam", "beams": 3}], ids=["greedy", "beam"])
def test_batched_decoding_is_single(make, name, decoding):
    model = pipeline.ECore(make.model(name).double())
    dialogues = [["word1 word2 sad word4"], ["joyful"], ["word7", "word8 word9 angry", "word10 word3 word30"]]
    together = model.respond(dialogues, max_length=8, **decoding)
    assert together == [model.respond(turns, max_length=8, **decoding) for turns in dialogues]
    perceived = model.perceive(dialogues)
    for reply, seen in zip(together, perceived, strict=True):
        assert [e for e, _ in reply.emotions] == [e for e, _ in seen.emotions]


@every_baseline
def test_each_weight_learns_and_the_loss_falls(make, name):
    """On one batch, without dropout; every parameter gets a gradient from the first step on."""
    model, batch = make.model(name, dropout=0.0, graph_dropout=0.0).train(), make.batch(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        loss = model.loss(batch).total
        loss.backward()
        if step == 0:
            assert [n for n, p in model.named_parameters() if p.grad is None] == []
            # A softmax does not see a bias of its keys: that gradient is 0, or what rounding leaves of it.
            idle = [n for n, p in model.named_parameters() if p.grad.abs().max() == 0]
            assert [n for n in idle if not n.endswith("attention.key.bias")] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def run_of(name, data, folder, steps, inferences, resume=False):
    """Train ``name`` for some steps with dropout; its weights."""
    if resume:
        train(folder, data, resume=True, max_steps=steps, progress=False)
    else:
        training = TrainingConfig(batch_size=10, max_steps=steps, warmup=4, log_every=1, validate_every=100)
        config = for_model(TINY, name)
        if name == "cem":
            config = dataclasses.replace(config, inferences=str(inferences))
        train(folder, data, config, training, progress=False)
    return pretrained.load(folder, "last").state_dict()


@every_baseline
def test_resumed_is_as_never_stopped(name, data, inferences_file, tmp_path):
    whole = run_of(name, data, tmp_path / "whole", 6, inferences_file)
    run_of(name, data, tmp_path / "parted", 3, inferences_file)
    parted = run_of(name, data, tmp_path / "parted", 6, inferences_file, resume=True)
    assert whole.keys() == parted.keys()
    assert [key for key in whole if not torch.equal(whole[key], parted[key])] == []


@every_baseline
def test_every_command_works_with_its_runs(name, prepared_folder, inferences_file, tmp_path, capsys):
    run = tmp_path / "run"
    given = ["--data", prepared_folder, "--out", run, *TINY_MODEL, "--model", name, "--max-steps", "2"]
    given += ["--warmup", "5", "--threads", "1"]
    given += ["--inferences", inferences_file] if name == "cem" else []
    assert cli.main(list(map(str, ["train", *given]))) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["model"] == name
    assert type(pretrained.load(run)) is BASELINES[name]
    assert cli.main(["evaluate", str(run), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert f", {name}, greedy" in shown
    assert "Acc" in shown
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    for folder in (run, tmp_path / "model"):
        assert cli.main(["generate", str(folder), "--text", "my dog died", "--threads", "1"]) == 0
    answers = capsys.readouterr().out
    assert answers.strip()


@every_baseline
@pytest.mark.parametrize("preset", ["baseline", "paper"])
def test_two_sizes(name, preset):
    """As its authors publish it, and at E-CORE's size."""
    size, own = PRESETS[preset][0], for_model(PRESETS[preset][0], name)
    for part in (
        "dim",
        "encoder_blocks",
        "decoder_blocks",
        "heads",
        "attention_dim",
        "feed_forward",
        "dropout",
    ):
        assert getattr(own, part) == getattr(size, part)


@every_baseline
@pytest.mark.parametrize(
    "wrong", [{"strategy": "soft", "emotions": False}, {"backbone": "gpt2"}, {"emotions": False}]
)
def test_settings_of_the_graph_are_refused(name, wrong):
    with pytest.raises(InputError, match=r"model: |emotions: |emotion_start: "):
        dataclasses.replace(for_model(ModelConfig(), name), **wrong)


def test_unknown_model_is_refused():
    with pytest.raises(InputError, match="model: expected"):
        ModelConfig(model="seek")


@every_baseline
def test_its_card_names_it(name):
    text = hub.card(for_model(ModelConfig(), name), None)
    assert f"# An empathetic dialogue model: {name}" in text
    assert "emotion graph" not in text
