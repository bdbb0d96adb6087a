"""Whole trainings: what they say, that each is written as it ends, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import whole_run
from ecore.config import PRESETS
from ecore.data.prepare import prepare
from ecore.demo import sample_corpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "prepared"
    prepare(sample_corpus(), folder, vocabulary="train", progress=False)
    return folder


def test_a_whole_run_and_what_26000_steps_would_take(prepared, monkeypatch):
    model, settings = PRESETS["tiny"]
    monkeypatch.setitem(
        PRESETS, "released", (model, dataclasses.replace(settings, log_every=2, validate_every=4))
    )
    (run,) = list(whole_run.whole_runs(prepared, "released", 8, "cpu"))
    assert (run["steps"], run["configuration"]) == (8, "as preset")
    # 25,992 steps and 6,498 validations more.
    more = 25_992 * run["seconds_per_step"] + 6498 * run["validation_seconds"]
    assert run["paper_seconds"] == pytest.approx(run["seconds"] + more)
    assert run["seconds"] > 2 * run["validation_seconds"]
    assert "as preset" in whole_run.report([run])


def test_whole_runs_are_written_as_they_come(prepared, monkeypatch, tmp_path, capsys):
    out = tmp_path / "runs.json"
    made = []

    def run(*_, precision, **__):
        if made:  # those before it are kept by then
            assert json.loads(out.read_text())["results"] == made
        made.append({"configuration": precision, "steps": 4})
        return made[-1]

    monkeypatch.setattr(whole_run, "whole_run", run)
    monkeypatch.setattr(whole_run, "report", lambda runs: f"{len(runs)} runs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("benchmarks.harness.machine", dict)
    whole_run.main(["--data", str(prepared), "--device", "cuda", "--steps", "4", "--out", str(out)])
    assert capsys.readouterr().out == "3 runs\n"
    kept = [run["configuration"] for run in json.loads(out.read_text())["results"]]
    assert kept == ["bfloat16", "tf32", "float32"]
    made.clear()
    whole_run.main(["--data", str(prepared), "--device", "cuda", "--precision", "tf32", "--out", str(out)])
    assert made == [{"configuration": "tf32", "steps": 4}]


def test_a_whole_run_refuses_in_one_line(tmp_path, capsys):
    for flags, said in (
        (["--steps", "1", "--data", "prepared"], "--steps: expected at least 2, got 1"),
        (["--data", str(tmp_path / "none")], f"{tmp_path / 'none'}"),
    ):
        with pytest.raises(SystemExit):
            whole_run.main(flags)
        assert said in capsys.readouterr().err.splitlines()[-1]
