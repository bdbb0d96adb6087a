"""Answers compared by the weights that they were found with."""

from __future__ import annotations

import json
from importlib.resources import as_file, files

import pytest

from benchmarks.generation import weights
from benchmarks.generation.__main__ import main
from ecore.cli import main as ecore


def test_agreement() -> None:
    expected = [[1, 2, 3], [4, 5], [6]]
    assert weights.agreement(expected, expected) == {"answers": 1.0, "words": 1.0}
    found = [[1, 2, 3], [4, 9, 5], [7]]  # the second is longer, and parts after its first word
    assert weights.agreement(expected, found) == {
        "answers": pytest.approx(1 / 3),
        "words": pytest.approx(4 / 7),
    }


def test_command(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(weights, "TIMED", 2)
    with as_file(files("ecore.data") / "sample") as corpus:
        assert ecore(["prepare", "--data", str(corpus), "--out", str(tmp_path / "data")]) == 0
    train = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--threads", "1"]
    assert ecore([*train, "--preset", "tiny", "--max-steps", "2"]) == 0
    run = ["--weights", str(tmp_path / "run"), "--rounds", "2", "--threads", "1"]
    main([*run, "--contexts", "4", "--out", str(tmp_path / "kept.json")])
    (result,) = json.loads((tmp_path / "kept.json").read_text())["results"]
    assert result["agreement"].keys() == {"int8", "bfloat16"}
    assert result["timings"]["float32"]["ratio"] == 1.0
    assert "4 contexts, 1 threads" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*run, "--contexts", "100000"])
    assert "--contexts: expected at most" in capsys.readouterr().err
