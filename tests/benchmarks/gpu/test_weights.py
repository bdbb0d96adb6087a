"""A run's weights in parts, and the run's folder made of them again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu import weights
from ecore import pretrained
from ecore.config import ModelConfig, TrainingConfig
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.demo import sample_corpus
from ecore.evaluation.report import evaluate_run
from ecore.pretrained import weights_file
from ecore.training.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    prepare(sample_corpus(), folder / "prepared", vocabulary="train", progress=False)
    model = ModelConfig(dim=12, encoder_blocks=1, decoder_blocks=1, feed_forward=16)
    settings = TrainingConfig(max_steps=2, warmup=2, validate_every=2, checkpoint_every=2, log_every=1)
    data = PreparedData.load(folder / "prepared")
    train(folder / "run", data, model, settings, progress=False)
    return folder / "run"


@pytest.fixture
def parts(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "PART_BYTES", 10_000)
    assert weights.main(["split", str(run), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("MB") == 4
    return sorted(tmp_path.glob("weights-*.safetensors"))


def test_parts_are_safetensors_of_about_the_same_size(run, parts):
    found = [load_file(part) for part in parts]
    names = [name for tensors in found for name in tensors]
    original = load_file(weights_file(run, "best"))
    assert sorted(names) == sorted(original)
    parameters = dict(pretrained.load(run).named_parameters())
    for tensors in found:
        for name, value in tensors.items():
            expected = torch.bfloat16 if name in parameters else original[name].dtype
            assert value.dtype == expected, name
            if name not in parameters:
                assert torch.equal(value, original[name]), "a table of data"
    largest = max(value.nbytes for tensors in found for value in tensors.values())
    sizes = [sum(value.nbytes for value in tensors.values()) for tensors in found]
    assert max(sizes) <= max(largest, sum(sizes) / 2)


def test_joined_parts_are_the_run(run, parts, tmp_path, capsys):
    joined = tmp_path / "joined"
    assert weights.main(["join", str(tmp_path), "--out", str(joined)]) == 0
    assert f"ecore evaluate {joined}" in capsys.readouterr().out
    mine, theirs = pretrained.load(joined).state_dict(), pretrained.load(run).state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype
        torch.testing.assert_close(mine[name], value, rtol=2**-8, atol=0.0)
    metrics = evaluate_run(joined, limit=2, progress=False)
    assert metrics["checkpoint"] == weights.JOINED


def test_paper_sized_weights_fit_in_four_parts_of_14_mb():
    rest = {f"layer {number}": 2 * 300 * 300 for number in range(130)}
    sizes = {"embedding": 2 * 23_714 * 300, "output": 2 * 23_714 * 300, **rest}
    groups = weights.packed(sizes, 4)
    assert sorted(name for group in groups for name in group) == sorted(sizes)
    assert max(sum(sizes[name] for name in group) for group in groups) < 14.5e6


def test_a_part_that_is_missing_foreign_or_damaged_is_refused(run, parts, tmp_path, capsys):
    def refused(said):
        out = tmp_path / "joined"
        assert weights.main(["join", str(tmp_path), "--out", str(out)]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()

    third = parts[2].read_bytes()
    parts[2].unlink()
    refused("part 3 of 4 is missing")
    parts[2].write_bytes(third[:100])
    refused("weights-3.safetensors: not a readable safetensors file")
    save_file({"a": torch.zeros(1)}, parts[2])
    refused("weights-3.safetensors: not a part that --keep-weights wrote")
    config = {"config": json.dumps({}), "checkpoint": "other", "part": "3", "parts": "4"}
    save_file({"a": torch.zeros(1)}, parts[2], config)
    refused("parts of different weights")
    for part in parts:
        part.unlink()
    refused("no weights-*.safetensors in it")


def test_existing_runs_are_not_overwritten(run, parts, tmp_path, capsys):
    before = (run / "config.json").read_bytes()
    assert weights.main(["join", str(tmp_path), "--out", str(run)]) == 2
    assert "exists; expected the name of a new folder" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before
    assert weights.main(["split", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "no such folder" in capsys.readouterr().err
