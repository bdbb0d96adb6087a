"""`ecore reproduce`: its data and settings, and what survives interruption and failure."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ecore.cli import main
from ecore.config import PRESETS, ModelConfig, TrainingConfig, from_dict, to_dict
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.rescore import with_intensity
from ecore.demo import sample_corpus
from ecore.errors import InputError
from ecore.paper.experiments import plan, reproduce, runs
from ecore.paper.experiments.plan import Run, Settings, Variant
from ecore.paper.experiments.runs import Outcome
from ecore.paper.published import HARD, SOFT
from ecore.pretrained import FORMAT
from ecore.training.journal import read_metrics
from tests.ecore.paper.experiments.made_up import fake_runs

pytest.importorskip("scipy.stats", reason="the tables test significance")


def test_other_intensities_change_nothing_else(prepared, tmp_path):
    data = PreparedData.load(prepared)
    scores = tmp_path / "scores.tsv"
    scores.write_text("happy\t0.95\nsad\t0.1\n")
    made = with_intensity(data, tmp_path / "skep", "skep", scores)
    prepare(
        sample_corpus(),
        tmp_path / "whole",
        vocabulary="train",
        intensity="skep",
        intensity_file=scores,
        progress=False,
    )
    whole = PreparedData.load(tmp_path / "whole")
    assert torch.equal(made.tables.intensity, whole.tables.intensity)
    assert not torch.equal(made.tables.intensity, data.tables.intensity)
    for key in ("intensity", "intensity_file", "thresholds", "intensity_shares", "vocabulary_fingerprint"):
        assert made.meta[key] == whole.meta[key]
    assert made.meta["fingerprint"] == whole.meta["fingerprint"]
    assert np.array_equal(np.load(made.folder / "test.samples.npy"), np.load(prepared / "test.samples.npy"))
    assert with_intensity(data, tmp_path / "skep", "skep", scores).meta == made.meta
    scores.write_text("happy\t0.9\n")
    with pytest.raises(InputError, match="skep: made of other data or other skep scores"):
        with_intensity(data, tmp_path / "skep", "skep", scores)
    assert with_intensity(data, tmp_path / "none", "none").thresholds((0.0, 0.075)) == (0.0, 0.0)


def test_other_intensities_of_a_folder_that_is_read_only_and_holds_more(prepared, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(prepared, given)
    (given / ".ipynb_checkpoints").mkdir()
    for path in given.iterdir():
        path.chmod(0o555 if path.is_dir() else 0o444)
    data = PreparedData.load(given)
    # Inside of it, too.
    for out in (tmp_path / "none", given / "none"):
        made = with_intensity(data, out, "none")
        assert {path.name for path in out.iterdir()} == {path.name for path in prepared.iterdir()}
        assert os.access(made.folder / "meta.json", os.W_OK)


@pytest.mark.parametrize("used", [True, False])
def test_no_ablation_of_relations_that_nothing_uses(prepared, monkeypatch, tmp_path, used):
    data = PreparedData.load(prepared)
    monkeypatch.setitem(data.meta, "relations", "relations.tsv")
    monkeypatch.setattr(PreparedData, "load", lambda *_: data)
    planned = []
    monkeypatch.setattr(reproduce, "execute", lambda runs, *_, **__: planned.extend(runs) or Outcome())
    model, training = PRESETS["tiny"]
    settings = Settings("tiny", replace(model, commonsense=used), training)
    reproduce.reproduce(["table8"], prepared, tmp_path / "out", settings, progress=False)
    assert any("commonsense" in run.name for run in planned) == used


def test_settings_that_contradict_are_refused(prepared, tmp_path):
    data = PreparedData.load(prepared)
    model, training = PRESETS["tiny"]
    settings = Settings("tiny", model, training, limit=8)
    settings.agree(tmp_path / "out", data)
    settings.agree(tmp_path / "out", data)
    for flag, other in {
        "--steps: .* was begun with 500, not 7": replace(settings, training=replace(training, max_steps=7)),
        "--warmup: .* was begun with 100, not 9": replace(settings, training=replace(training, warmup=9)),
        "--no-graph-norm: .* True, not False": replace(settings, model=replace(model, graph_norm=False)),
        "--limit: .* was begun with 8, not none": replace(settings, limit=None),
        "--preset: .* tiny, not paper": replace(settings, preset="paper"),
    }.items():
        with pytest.raises(InputError, match=f"^{flag}.*or another --out$"):
            other.agree(tmp_path / "out", data)
    scores = tmp_path / "scores.tsv"
    scores.write_text("happy\t0.95\n")
    with pytest.raises(InputError, match=r"^--data: .* was begun with"):
        settings.agree(tmp_path / "out", with_intensity(data, tmp_path / "skep", "skep", scores))
    settings_file = tmp_path / "out" / "settings.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"format": 1}))
    with pytest.raises(InputError, match=r"its runs are of format 1, those of now of .* take another --out$"):
        settings.agree(tmp_path / "out", data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds something else"):
        settings.agree(tmp_path / "mine", data)


def test_a_folder_is_taken_until_its_last_process_has_ended(prepared, tmp_path):
    model, training = PRESETS["tiny"]
    run = Run(Variant("soft"), 0, tmp_path / "run", prepared, model, training)
    with reproduce._alone(tmp_path):
        left_behind = runs._Process(run, tmp_path, {})
    try:
        with pytest.raises(InputError, match="is at work there"), reproduce._alone(tmp_path):
            pass
    finally:
        left_behind.kill()
    with reproduce._alone(tmp_path):
        pass


def test_unusable_input_gets_one_line(command, tmp_path, capsys):
    with pytest.raises(InputError, match=r"^--seeds: expected at least 1, got 0"):
        command("table7", "--out", tmp_path / "o", "--seeds", 0)
    with pytest.raises(InputError, match=r"^--sample: expected 0 to 123, got 124"):
        command("figure5", "--out", tmp_path / "o", "--sample", 124)
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"conv_id": "nobody", "emotions": ["sad", "joyful"]}\n')
    with pytest.raises(InputError, match=r"labels\.jsonl:1: no conversation 'nobody'"):
        command("table3", "--out", tmp_path / "o", "--multi-emotion", labels)
    with pytest.raises(SystemExit):
        command("table9", "--out", tmp_path / "o", "--intensity-file", "vader=x")
    assert "expected skep=FILE, vad=FILE or sentiwordnet=FILE" in capsys.readouterr().err
    out = tmp_path / "o"
    assert command("table6", "--out", out) == 0  # nothing to train, but a table
    assert "needs --backbone" in (out / "table6.md").read_text()
    with (
        reproduce._alone(out),
        pytest.raises(InputError, match=r"another `ecore reproduce` is at work there"),
    ):
        command("table6", "--out", out)
    with pytest.raises(InputError, match=r"^--steps: .* was begun with 500, not 6; "):
        command("table6", "--out", out, "--steps", 6)


def test_word_vectors_too_wide_are_refused_before_any_run(tmp_path):
    (tmp_path / "glove.txt").write_text("sad " + " ".join(["0.1"] * 13) + "\n")
    data = tmp_path / "prepared"
    prepare(sample_corpus(), data, glove=[tmp_path / "glove.txt"], vocabulary="train", progress=False)
    model, training = PRESETS["tiny"]
    settings = Settings("tiny", replace(model, dim=12), training)
    with pytest.raises(
        InputError, match=r"^--dim: expected at least 13, the width of .*word vectors, got 12$"
    ):
        reproduce.reproduce(["table1"], data, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    # Where nothing takes them, as on a backbone, their width does not matter.
    reproduce.reproduce(["table6"], data, tmp_path / "out", settings)


def test_what_counts_as_done(tmp_path):
    folder = tmp_path / "soft-seed0"
    folder.mkdir()
    run = replace(fake_runs(Variant("soft"), 1)[0], folder=folder)
    assert run.training.max_steps == 500
    assert runs.steps_of(run) == 0
    (folder / "checkpoints.json").write_text('{"best": null, "last": "checkpoint-000400"}')
    (folder / "metrics.jsonl").write_text('{"step": 400, "loss": 1}\n{"step": 4')  # torn by a crash
    assert runs.steps_of(run) == 400
    assert not runs.is_done(run)
    (folder / "evaluation-test").mkdir()
    (folder / "evaluation-test/metrics.json").write_text("{}")  # somebody scored it on its way
    assert not runs.is_done(run)
    (folder / "scores").mkdir()
    (folder / "scores/metrics.json").write_text("{}")  # what `reproduce` writes, last of all
    assert not runs.is_done(run)
    settings = {"model": to_dict(run.model), "training": to_dict(run.training)}
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, "data": {}, **settings}))
    assert runs.is_done(run)
    assert not runs.is_done(replace(run, model=replace(run.model, backbone="another")))


def test_interrupted_and_gone_on_with(command, prepared, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the first of two runs: it keeps its steps and continues from them, the second is not begun."""
    out, seen = tmp_path / "out", runs.steps_of

    def interrupting(run):
        step = seen(run)
        if 5 <= step < 150 and not interrupted:
            interrupted.append(step)
            signal.raise_signal(signal.SIGINT)
        return step

    interrupted = []
    monkeypatch.setattr(runs, "steps_of", interrupting)
    given = ("--out", out, "--steps", 150, "--checkpoint-every", 150)
    assert command("table7", *given, "--seeds", 1) == 130
    assert interrupted
    assert "the same command continues" in capsys.readouterr().err
    assert "soft-seed0 not done" in (out / "table7.md").read_text()
    kept = json.loads((out / "runs/soft-seed0/checkpoints.json").read_text())["last"]
    assert kept != "checkpoint-000150"
    assert not (out / "runs/hard-seed0").exists()

    kept_settings = json.loads((out / "settings.json").read_text())
    settings = Settings(
        "tiny",
        from_dict(ModelConfig, kept_settings["model"]),
        from_dict(TrainingConfig, kept_settings["training"]),
    )
    one = plan.plan_runs({Variant("soft"): 1}, out, settings, {None: PreparedData.load(prepared)})
    outcome = runs.execute(one, out / "logs", preset="tiny", limit=8, threads=1, progress=False)
    assert (outcome.failures, outcome.interrupted) == ({}, False)
    assert runs.is_done(one[0])
    assert [line["step"] for line in read_metrics(one[0].folder)] == [1, *range(5, 151, 5)]
    log = (out / "logs/soft-seed0.log").read_text()
    assert f"steps {int(kept.removeprefix('checkpoint-'))} to 150" in " ".join(log.split())


def test_a_failed_run_loses_no_other(command, tmp_path, capsys):
    """And what is done is not done again: not the training where only the scores are gone."""
    out = tmp_path / "out"
    given = ("table7", "--out", out, "--seeds", 1, "--steps", 2, "--jobs", 2)
    assert command("table6", *given[1:]) == 0
    (out / "runs").mkdir()
    (out / "runs/hard-seed0").touch()  # a file where the run's folder should be
    assert command(*given) == 1
    said = capsys.readouterr().err
    assert "ecore: error: hard-seed0 failed: " in said
    assert "a file is in the way" in said
    text = (out / "table7.md").read_text()
    assert "| **ours**, 1 seed |" in text
    assert "| **ours**, failed | – |" in text
    assert "a file is in the way" in text
    before = json.loads((out / "table7.json").read_text())["rows"][0]

    (out / "runs/hard-seed0").unlink()
    weights = out / "runs/soft-seed0/checkpoint-000002.safetensors"
    written = weights.stat().st_mtime_ns
    (out / "runs/soft-seed0/scores/metrics.json").unlink()
    # A look by other means changes no table.
    assert main(["evaluate", str(out / "runs/soft-seed0"), "--limit", "3"]) == 0
    assert command(*given) == 0
    assert "2 runs of 2 steps: 0 done, 1 begun, 1 to begin" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == written
    soft, hard = json.loads((out / "table7.json").read_text())["rows"]
    assert soft == before
    metrics = json.loads((out / "runs/hard-seed0/scores/metrics.json").read_text())
    assert metrics["samples"] == 8
    assert hard["ours"]["PPL"]["values"] == [metrics["ppl_per_sample"]]
    assert hard["ours"]["Acc"]["mean"] == metrics["accuracy"]
    assert command("cases", *given) == 0
    assert "2 runs of 2 steps: 2 done, 0 begun, 0 to begin" in capsys.readouterr().out
    shown = json.loads((out / "cases.json").read_text())
    assert len(shown) == 5
    assert set(shown[0]["answers"]) == {SOFT, HARD}


def test_a_process_whose_parent_died_stops_with_a_checkpoint(command, prepared, tmp_path):
    model = ModelConfig(dim=12, encoder_blocks=1, decoder_blocks=1, feed_forward=16)
    training = TrainingConfig(max_steps=100_000, log_every=1, checkpoint_every=100_000)
    job = {"folder": str(tmp_path / "run"), "data": str(prepared), "model": to_dict(model)}
    job |= {"training": to_dict(training), "preset": "tiny", "limit": 8, "device": "cpu", "threads": 1}
    log = (tmp_path / "log").open("wb")
    with (
        log,
        subprocess.Popen(
            [sys.executable, "-m", "ecore.paper.experiments.worker"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        while not (tmp_path / "run/metrics.jsonl").exists() or not read_metrics(tmp_path / "run"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        process.stdin.close()  # as the system does when the parent is gone
        assert process.wait(timeout=60) == 130
    assert (tmp_path / "run/checkpoints.json").exists()
