"""Runs with a backbone: training, resuming, commands, and folders that are refused."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch

from ecore import pipeline, pretrained
from ecore.cli import main
from ecore.config import TrainingConfig
from ecore.errors import InputError
from ecore.files import read_json
from ecore.pretrained import build
from ecore.training.journal import read_metrics
from ecore.training.trainer import train
from tests.ecore.model.gpt2.tiny import TINY

transformers = pytest.importorskip("transformers", reason="needs the extra `pretrained`")

from ecore.data.subwords.vocabulary import OFFSET, SubwordVocabulary  # noqa: E402
from ecore.model.gpt2 import GPT2ECore  # noqa: E402

STEPS = TrainingConfig(
    batch_size=8, max_steps=12, warmup=6, log_every=3, validate_every=6, checkpoint_every=4
)


@pytest.fixture
def one_run(data, gpt2_folder, tmp_path):
    """A run of twelve steps in ``tmp_path / "whole"``."""
    config = dataclasses.replace(TINY, backbone=str(gpt2_folder), strategy="hard", dropout=0.1)
    train(tmp_path / "whole", data, config, STEPS, progress=False)
    return tmp_path / "whole", config


def test_resuming_equals_never_having_stopped(one_run, data, tmp_path):
    run, config = one_run
    train(tmp_path / "parts", data, config, dataclasses.replace(STEPS, max_steps=7), progress=False)
    # A run with a checkpoint needs the folder that it was started from no more.
    settings = read_json(tmp_path / "parts" / "config.json")
    settings["model"]["backbone"] = str(tmp_path / "gone")
    (tmp_path / "parts" / "config.json").write_text(json.dumps(settings))
    train(tmp_path / "parts", data, resume=True, max_steps=12, progress=False)
    losses = [[(line["step"], line["loss"]) for line in read_metrics(r)] for r in (run, tmp_path / "parts")]
    assert dict(losses[0]).items() <= dict(losses[1]).items()
    assert losses[0][-1][1] < 0.95 * losses[0][0][1]
    whole, parts = (pretrained.load(r, "last").state_dict() for r in (run, tmp_path / "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_travels_whole(one_run, data, tmp_path):
    run, _ = one_run
    model = pretrained.load(run)
    assert isinstance(model, GPT2ECore)
    assert model.gpt2.config.resid_pdrop == 0.1
    pretrained.save(model, tmp_path / "saved")
    again = pretrained.load(tmp_path / "saved")
    turns = ["Someone broke my awful car."]
    assert pipeline.ECore(again).respond(turns, max_length=6) == pipeline.ECore(model).respond(
        turns, max_length=6
    )
    (tmp_path / "saved" / "backbone" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file$"):
        pretrained.load(tmp_path / "saved")


def test_commands(data, gpt2_folder, tmp_path, capsys):
    run, prepared = str(tmp_path / "run"), str(data.folder)
    flags = ["--preset", "tiny", "--max-steps", "3", "--device", "cpu", "--backbone", str(gpt2_folder)]
    assert main(["train", "--data", prepared, "--out", run, *flags]) == 0
    assert main(["evaluate", run, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    size = OFFSET + len(transformers.AutoTokenizer.from_pretrained(gpt2_folder))
    assert f"'subword' vocabulary of {size} subwords" in printed
    assert "Kneser-Ney" not in printed
    assert "naive Bayes" in printed
    assert main(["generate", run, "--text", "My dog died.", "--device", "cpu"]) == 0
    assert "perceived:" in capsys.readouterr().out
    assert main(["train", "--data", prepared, "--out", run + "2", *flags, "--heads", "2"]) == 2
    assert "--heads: of no use with --backbone" in capsys.readouterr().err
    assert main(["train", "--data", prepared, "--out", run + "2", *flags[:-1], str(tmp_path)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "run2").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", None, "its tokenizer has no token for"),
        ("model.safetensors", b"version https://git-lfs", "cannot be loaded"),
        ("config.json", "width", "cannot be loaded"),
    ],
)
def test_damaged_folders_are_refused(make, gpt2_folder, tmp_path, name, content, message):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    if content is None:
        for file in folder.glob("*token*"):
            file.unlink()
    elif content == "width":  # of another model than the weights
        (folder / name).write_text(json.dumps(read_json(folder / name) | {"n_embd": 64}))
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        make(backbone=str(folder))


def test_every_flipped_bit_of_what_a_run_keeps_of_its_backbone_is_seen(make, tmp_path):
    pretrained.save(make(), tmp_path / "model")
    files = sorted((tmp_path / "model/backbone").iterdir())
    assert {"config.json", "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for bit in (1, 8 * len(content) // 2 + 1, 8 * len(content) - 40):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"backbone/{path.name}"):
                pretrained.load(tmp_path / "model")
        path.write_bytes(content)
    (tmp_path / "model/backbone/checksums.json").unlink()  # as of folders made before
    pretrained.load(tmp_path / "model")


def test_what_is_no_gpt2_is_refused(make, gpt2_folder, tmp_path, data, monkeypatch):
    settings = read_json(gpt2_folder / "config.json")
    for change in ({"tie_word_embeddings": False}, {"model_type": "gptj"}):
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match="expected a GPT-2 that shares its word embedding"):
            build(dataclasses.replace(TINY, backbone=str(tmp_path)), data, tmp_path)
    tokenizer = make().vocabulary.tokenizer
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="with an end-of-text token"):
        SubwordVocabulary(tokenizer, data.vocabulary)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'ecore\[pretrained\]'"):
        make()


def test_no_code_of_a_folder_runs(make, gpt2_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
    for name, change in (
        ("config.json", {"auto_map": names}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}),
    ):
        (folder / name).write_text(json.dumps(read_json(folder / name) | change))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks is trusted
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    make(backbone=str(folder))
    assert not (tmp_path / "ran").exists()
