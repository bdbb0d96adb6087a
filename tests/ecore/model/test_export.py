"""A run's model as a folder of its own: in fewer bytes, whole, and answering alike."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open

from ecore import cli, pretrained
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.files import read_json, write_json
from ecore.model.weights import save_weights
from ecore.pipeline import ECore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def run(make, tmp_path):
    """A run with two checkpoints, as training leaves it but for the log."""
    folder = tmp_path / "run"
    pretrained.save(make.model(tie_embeddings=True), folder)
    save_weights(make.model(1, tie_embeddings=True), folder / "checkpoint-000007.safetensors")
    write_json(folder / "checkpoints.json", {"best": "checkpoint-final", "last": "checkpoint-000007"})
    config = read_json(folder / "config.json")
    config["data"] |= {"folder": "/home/somebody/prepared", "vocabulary": "train"}
    write_json(folder / "config.json", config | {"preset": "tiny", "training": {"max_steps": 7}}, sealed=True)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_every_weight_is_the_runs_rounded(make, run, tmp_path, dtype):
    model, kind = make.model(tie_embeddings=True), DTYPES[dtype]
    file = pretrained.export(run, tmp_path / "out", kind)
    with safe_open(file, "pt") as stored:
        names = set(stored.keys())
        assert names == set(model.state_dict()) - {"output.weight"}
        for name in names:
            value, table = stored.get_tensor(name), name in WordTables._fields
            if value.is_floating_point():
                assert value.dtype == (torch.float32 if table else kind)
            assert torch.equal(value, model.state_dict()[name].to(value.dtype))
    loaded = pretrained.load(tmp_path / "out")
    assert not loaded.training
    assert loaded.config == model.config
    for name, value in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert value.dtype == expected.dtype
        if value.is_floating_point() and name not in WordTables._fields:
            expected = expected.to(kind).float()
        assert torch.equal(value, expected)
    answers = [ECore.from_pretrained(folder).respond(["word1 word2"]) for folder in (run, tmp_path / "out")]
    if dtype == "float32":
        assert answers[0] == answers[1]
    assert answers[1]


def test_half_the_bytes(run, tmp_path):
    sizes = [pretrained.export(run, tmp_path / name, kind).stat().st_size for name, kind in DTYPES.items()]
    assert sizes[1] == pytest.approx(sizes[2], rel=0.01)
    assert sizes[1] < 0.65 * sizes[0]  # headers and word tables are as large as before


def test_another_checkpoint_and_the_origin(make, run, tmp_path):
    pretrained.export(run, tmp_path / "out", torch.float32, "last")
    weight = make.model(1, tie_embeddings=True).embedding.word.weight
    assert torch.equal(pretrained.load(tmp_path / "out").embedding.word.weight, weight)
    config = read_json(tmp_path / "out" / "config.json")
    assert config["exported"] == {"checkpoint": "checkpoint-000007", "dtype": "float32"}
    assert (config["preset"], config["training"]) == ("tiny", {"max_steps": 7})
    assert "somebody" not in json.dumps(config)
    assert config["data"]["vocabulary"] == "train"


@pytest.mark.parametrize("name", ["config.json", "checkpoints.json", "checkpoint-final.safetensors"])
def test_damage_is_noticed(run, tmp_path, name):
    pretrained.export(run, tmp_path / "out", torch.bfloat16)
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    place = len(content) // 2 if name.endswith("safetensors") else content.index(b":") + 2
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        pretrained.load(tmp_path / "out")


def test_what_float16_cannot_hold(make, tmp_path):
    """Nothing is written, and the message names the weight."""
    model = make.model()
    with torch.no_grad():
        model.output.bias[3] = 70_000.0
    pretrained.save(model, tmp_path / "run")
    with pytest.raises(InputError, match=r"output.bias: its largest weight is 7e\+04, float16 holds"):
        pretrained.export(tmp_path / "run", tmp_path / "out", torch.float16)
    assert not list((tmp_path / "out").glob("*"))
    pretrained.export(tmp_path / "run", tmp_path / "out", torch.bfloat16)


def test_from_the_command_line(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(run), "--dtype", "bfloat16", "--out", str(out)]) == 0
    assert "bfloat16 weights" in capsys.readouterr().out
    before = {path: os.stat(path).st_mtime_ns for path in out.iterdir()}
    assert cli.main(["export", str(run), "--out", str(out)]) == 2
    assert "is not empty; expected a new folder" in capsys.readouterr().err
    assert {path: os.stat(path).st_mtime_ns for path in out.iterdir()} == before
    for words in (["evaluate", str(out)], ["generate", str(out), "--split", "test", "--out", "x.jsonl"]):
        assert cli.main(words) == 2
        assert "names no data folder" in capsys.readouterr().err
