"""A model on disk, and what is said of one that is missing, damaged or another's."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ecore import pretrained
from ecore.config import ModelConfig
from ecore.data.vocabulary import Vocabulary
from ecore.errors import InputError
from ecore.model import ECore


@pytest.mark.parametrize(
    "settings", [{}, {"tie_embeddings": True}, {"strategy": "hard", "ablations": ("graph",)}]
)
@torch.no_grad()
def test_round_trip(make, tmp_path, settings):
    model, batch = make.model(**settings), make.batch()
    pretrained.save(model, tmp_path / "model")
    for which in ("best", "last"):
        loaded = pretrained.load(tmp_path / "model", which)
        assert loaded.config == model.config
        assert loaded.vocabulary.words == model.vocabulary.words
        assert not loaded.training
        assert torch.equal(loaded(batch).logits, model(batch).logits)
        for one, other in zip(loaded.tables, model.tables, strict=True):
            assert torch.equal(one, other)


def test_tied_weights(make, tmp_path):
    model = make.model(tie_embeddings=True)
    assert model.output.weight is model.embedding.word.weight
    assert make.model().output.weight is not make.model().embedding.word.weight
    tied = sum(p.numel() for p in model.parameters())
    assert tied == sum(p.numel() for p in make.model().parameters()) - model.output.weight.numel()
    pretrained.save(model, tmp_path)
    loaded = pretrained.load(tmp_path)
    assert loaded.output.weight is loaded.embedding.word.weight
    size = model.output.weight.numel() * 4
    (weights,) = tmp_path.glob("*.safetensors")
    pretrained.save(make.model(), tmp_path / "untied")
    (untied,) = (tmp_path / "untied").glob("*.safetensors")
    assert untied.stat().st_size - weights.stat().st_size >= size


def test_the_folder_travels(make, tmp_path):
    pretrained.save(make.model(), tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    pretrained.load(tmp_path / "there")


@torch.no_grad()
def test_an_older_model_answers_as_it_did(make, tmp_path):
    """Its config lacks the graph's later fields: it keeps its biases and its form of Eq. 8."""
    model, batch = make.model(own_weight=False, graph_bias=True), make.batch()
    for layer in model.perceiver.graph_network.layers:
        layer.attention.gate.bias.fill_(20.0)  # large edges, so that the forms of Eq. 8 differ
    pretrained.save(model, tmp_path)
    edit(
        tmp_path / "config.json",
        lambda config: [config["model"].pop(k) for k in ("own_weight", "graph_bias")],
    )
    loaded = pretrained.load(tmp_path)
    assert loaded.config == model.config
    answer = model(batch)
    assert torch.equal(loaded(batch).logits, answer.logits)
    present = make.model(graph_bias=True)
    present.load_state_dict(model.state_dict())
    signals = [m(batch).encoding.perceived.global_signal for m in (model, present)]
    assert not torch.allclose(*signals)


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def revised(folder, change):
    """Another vocabulary, and a configuration that is in order with it."""
    edit(folder / "vocabulary.json", change)
    fingerprint = Vocabulary.load(folder / "vocabulary.json").fingerprint
    edit(folder / "config.json", lambda c: c["data"].update(vocabulary_fingerprint=fingerprint))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "no vocabulary": (lambda f: (f / "vocabulary.json").unlink(), "vocabulary.json: no such file"),
    "no pointer": (
        lambda f: (f / "checkpoints.json").unlink(),
        "checkpoints.json: no such file; the run has no checkpoint yet",
    ),
    "no weights": (lambda f: (f / "checkpoint-final.safetensors").unlink(), "safetensors: no such file"),
    "torn weights": (
        lambda f: truncate(f / "checkpoint-final.safetensors"),
        "not a readable safetensors file",
    ),
    "empty weights": (
        lambda f: (f / "checkpoint-final.safetensors").write_bytes(b""),
        "not a readable safetensors",
    ),
    "torn config": (lambda f: truncate(f / "config.json"), r"config.json:\d+: not valid JSON"),
    "other format": (lambda f: edit(f / "config.json", lambda c: c.update(format=99)), "format 2$"),
    "older format": (
        lambda f: edit(f / "config.json", lambda c: c.update(format=1)),
        "of format 1, .*again$",
    ),
    "no model": (lambda f: edit(f / "config.json", lambda c: c.pop("model")), "damaged: no 'model'"),
    "no data": (lambda f: edit(f / "config.json", lambda c: c.pop("data")), "damaged: no 'data'"),
    "unknown setting": (
        lambda f: edit(f / "config.json", lambda c: c["model"].update(depth=3)),
        "unknown setting 'depth'",
    ),
    "bad setting": (
        lambda f: edit(f / "config.json", lambda c: c["model"].update(strategy="firm")),
        "strategy",
    ),
    "other width": (
        lambda f: edit(f / "config.json", lambda c: c["model"].update(dim=48)),
        r"does not fit this model: .*expected \[.*48.*\], got \[.*24.*\]",
    ),
    "deeper": (
        lambda f: edit(f / "config.json", lambda c: c["model"].update(encoder_blocks=2)),
        "does not fit this model: encoder.blocks.1.* got nothing",
    ),
    "empty pointer": (lambda f: (f / "checkpoints.json").write_text("{}"), "names no best checkpoint"),
    "no vocabulary in it": (lambda f: (f / "vocabulary.json").write_text("{}"), "not a vocabulary"),
    "same number of other words": (
        lambda f: edit(f / "vocabulary.json", lambda v: v["words"].__setitem__(-1, "another")),
        "vocabulary.json: of another model: ",
    ),
    "weights of a shorter vocabulary": (
        lambda f: revised(f, lambda v: v["words"].append("another")),
        "of another vocabulary: 73 words, expected the 74 of ",
    ),
    "weights of more emotions": (
        lambda f: revised(f, lambda v: v["emotions"].pop()),
        r"does not fit this model: .*expected \[.*7.*\], got \[.*8",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_gets_one_line(make, tmp_path, damage):
    folder = tmp_path / "model"
    pretrained.save(make.model(), folder)
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(InputError, match=message) as caught:
        pretrained.load(folder)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else(make, tmp_path):
    pretrained.save(make.model(), tmp_path)
    save_file({"x": torch.zeros(3)}, tmp_path / "checkpoint-final.safetensors")
    with pytest.raises(InputError, match="does not hold an E-CORE model"):
        pretrained.load(tmp_path)


def test_unknown_checkpoint(make, tmp_path):
    pretrained.save(make.model(), tmp_path)
    with pytest.raises(InputError, match="expected best or last, got 'first'"):
        pretrained.load(tmp_path, "first")


# Word vectors -----------------------------------------------------------------------------------------------


def test_word_vectors(make, vocabulary):
    """Rows as they are; variance 0.01 where a word or a dimension has none; PAD is zero."""
    vectors = np.random.default_rng(0).normal(size=(len(vocabulary), 20)).astype(np.float32) + 5.0
    vectors[7] = np.nan
    vectors[9, 10:] = np.nan  # in one of two files that stand side by side
    before = vectors.copy()
    weight = make.model(embeddings=vectors).embedding.word.weight.detach().numpy()
    assert np.array_equal(vectors, before, equal_nan=True)
    known = ~np.isnan(vectors)
    known[0] = False
    assert np.array_equal(weight[:, :20][known], vectors[known])
    assert not weight[0].any()
    unknown = np.concatenate([weight[7], weight[9, 10:], weight[1:, 20:].ravel()])
    assert np.isfinite(weight).all()
    assert unknown.std() == pytest.approx(0.1, rel=0.2)
    assert abs(unknown).max() < 0.6


@pytest.mark.parametrize(
    "shape, message",
    [
        ((73, 25), "embeddings: expected at most dim = 24 columns, got 25"),
        ((70, 20), "embeddings: expected 73 rows"),
    ],
)
def test_word_vectors_that_do_not_fit(make, shape, message):
    with pytest.raises(InputError, match=message):
        make.model(embeddings=np.zeros(shape, dtype=np.float32))


def test_tables_that_do_not_fit(make, vocabulary):
    other = Vocabulary((*vocabulary.words, "more"), vocabulary.emotions)
    with pytest.raises(InputError, match="word tables: expected 74 words as in the vocabulary, got 73"):
        ECore(ModelConfig(dim=12), other, make.tables(vocabulary))


def test_a_run_keeps_its_settings(make, tmp_path):
    model = make.model()
    pretrained.save(model, tmp_path / "model")
    pretrained.save(model, tmp_path / "model")  # a model's folder may be written again
    config = json.loads((tmp_path / "model/config.json").read_text())
    text = json.dumps({**{k: v for k, v in config.items() if k != "checksum"}, "training": {}})
    (tmp_path / "model/config.json").write_text(text)
    with pytest.raises(InputError, match="holds a run, whose settings would be lost"):
        pretrained.save(model, tmp_path / "model")
    assert (tmp_path / "model/config.json").read_text() == text
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be made a folder"):
        pretrained.save(model, tmp_path / "file")


def test_weights_are_saved_as_numbers_with_fractions(make, tmp_path):
    with pytest.raises(InputError, match="dtype: expected float32, bfloat16 or float16, got int8"):
        pretrained.save(make.model(), tmp_path / "model", torch.int8)
    assert not (tmp_path / "model").exists()
