"""The Python of docs/talking.md runs as it stands, on a small model of the sample corpus."""

from pathlib import Path

import torch

from ecore import pretrained
from ecore.config import ModelConfig
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.demo import sample_corpus
from ecore.model import ECore
from tests.pages import python_alone

PAGE = Path(__file__).parents[1] / "docs/talking.md"


def test_examples(tmp_path, monkeypatch, capsys):
    prepare(sample_corpus(), tmp_path / "prepared", vocabulary="train", progress=False)
    data = PreparedData.load(tmp_path / "prepared")
    torch.manual_seed(0)
    config = ModelConfig(dim=24, encoder_blocks=1, decoder_blocks=1, feed_forward=16)
    pretrained.save(ECore(config, data.vocabulary, data.tables), tmp_path / "ecore-demo/run")
    monkeypatch.chdir(tmp_path)
    blocks = python_alone(PAGE)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(names["replies"]) == 2
    assert names["seen"].words[0] == "[CLS]"
    assert "He was twelve." in capsys.readouterr().out
