"""The command line's refusals: one clear line, and nothing is written."""

import os

import pytest
import torch

from ecore import cli
from tests.ecore.cli.commands import SMALL, refused


def test_divergence(prepared, capsys, tmp_path):
    arguments = ["train", "--data", prepared, "--out", tmp_path / "run", *SMALL, "--max-steps", 20]
    line = refused(capsys, *arguments, "--factor", "1e6", code=1)
    assert "not finite" in line or "loss is" in line
    assert "--factor" in line


def test_an_existing_run_is_left_alone(run, prepared, capsys):
    line = refused(capsys, "train", "--data", prepared, "--out", run, *SMALL)
    assert "--resume" in line


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["train", "--out", "new"], "--data"),
        (["train", "--out", "new", "--resume"], "new: no such folder"),
        (["train", "--data", "{corpus}", "--out", "new"], "not a prepared folder"),
        (["train", "--data", "{prepared}", "--out", "new", "--dim", "100"], "dim: 100 cannot be split"),
        (["train", "--data", "{prepared}", "--out", "new", "--thresholds", "0", "0.2"], "no match for 0.2"),
        (["train", "--data", "{prepared}", "--out", "{corpus}/train.jsonl/run", *SMALL], "train.jsonl"),
        (["prepare", "--data", "missing", "--out", "new"], "missing: no such folder"),
        (["evaluate"], "either a run's folder or --predictions"),
        (["evaluate", "{prepared}"], "config.json"),
        (["evaluate", "--predictions", "missing.jsonl"], "missing.jsonl: no such file"),
        (["generate", "{run}"], "either --text TURN or --split"),
        (["generate", "{run}", "--split", "test"], "--out"),
        (["generate", "{run}", "--text", "hi", "--top-p", "3"], "top_p"),
        (["generate", "{run}", "--text", ""], "turn 1 is empty"),
        (["generate", "{run}", "--text", "hi", "--max-length", "4096"], "max_length: expected at most 4095"),
        (["generate", "{run}", "--split", "test", "--out", "."], "is a folder; expected a file"),
        (["train", "--data", "{prepared}", "--out", "new", "--seed", "-1", *SMALL], "seed: expected a number"),
        (["generate", "{run}", "--text", "hi", "--out", "new"], "--out: goes with --split"),
        (["evaluate", "--predictions", "p.jsonl", "--limit", "3"], "--limit: goes with a run's folder"),
        (["evaluate", "--predictions", "p.jsonl", "--no-repeat-ngram", "3"], "--no-repeat-ngram: goes with a run's"),
        (["evaluate", "--predictions", "p.jsonl", "--checkpoint", "last"], "--checkpoint: goes with a run's folder"),
        (
            ["train", "--data", "{prepared}", "--out", "n", "--graph-form", "released", "--score-scale", "1"],
            "--score-scale: of no use with graph form released",
        ),
        (
            ["reproduce", "table4", "--data", "{prepared}", "--out", "n", "--preset", "released", "--graph-norm"],
            "--graph-norm: of no use with graph form released",
        ),
        (["evaluate", "--predictions", "p.jsonl", "--weights", "int8"], "--weights: goes with a run's folder"),
        (["reproduce", "table1", "--data", "{prepared}", "--out", "n", "--precision", "auto"],
         "--precision auto: expected one that all runs have"),
        (["evaluate", "{run}", "--top-k", "5"], "top_k: only for method 'sample'"),
        (["evaluate", "{run}", "--beams", "5"], "--beams: only for --method beam, the method is 'greedy'"),
        (["generate", "{run}", "--text", "hi", "--method", "sample", "--length-penalty", "2"],
         "--length-penalty: only for --method beam, the method is 'sample'"),
        (["generate", "{run}", "--text", "hi", "--batch-size", "0"], "--batch-size: goes with --split"),
        (["evaluate", "--predictions", "p.jsonl", "--split", "valid"], "--split: goes with a run's folder"),
        (["evaluate", "--predictions", "p.jsonl", "--batch-size", "3"], "--batch-size: goes with a run's folder"),
        (["evaluate", "--predictions", "p.jsonl", "--precision", "tf32"], "--precision: goes with a run's folder"),
        (["evaluate", "--predictions", "p.jsonl", "--device", "cpu"], "--device: goes with a run's folder"),
        (["evaluate", "--predictions", "p.jsonl", "--threads", "1"], "--threads: goes with a run's folder"),
        (["figures", "{run}", "--out", "new", "--only", "2", "--text", "hi"], "--text: of Figures 5 and 6 alone"),
        (["figures", "{run}", "--out", "new", "--only", "4", "--sample", "0"], "--sample: of Figures 5 and 6 alone"),
        (["prepare", "--data", "{corpus}", "--out", "new", "--min-count", "3"], "--min-count: goes with --vocabulary"),
        (["prepare", "--data", "{corpus}", "--out", "new", "--intensity", "none", "--intensity-floor", "0"],
         "--intensity-floor: of no use with --intensity none"),
        (["demo", "--steps", "0", "--out", "new"], "steps: expected at least 1, got 0"),
        (["annotate", "run", "--data", "{corpus}", "--annotator", "lexicon", "--votes", "2", "--out", "new"],
         "--votes: goes with --annotator file"),
        (["annotate", "review", "{run}", "--out", "gone/new"], "gone/new: its folder does not exist"),
        (["human", "export", "A={run}/a", "B={run}/b", "--out", "{run}"], "exists already; expected a new or empty"),
        (["human", "score", "{run}", "sheet.csv", "--out", "."], "is a folder; expected a file"),
        (["reproduce", "table1", "--data", "{prepared}", "--out", "new", "--steps", "0"],
         "--steps: expected at least 1"),
        (["reproduce", "table9", "--data", "{prepared}", "--out", "new", "--intensity-file", "vad=gone"],
         "gone: no such file"),
        (["reproduce", "table6", "--data", "{prepared}", "--out", "new6", "--backbone", "{corpus}"],
         "cannot be loaded"),
        (["chat", "missing"], "missing: no such folder"),
        (["info", "missing"], "missing: no such folder"),
        (["train", "--data", "{prepared}", "--out", "new", "--threads", "0"], "--threads"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(corpus, prepared, run, capsys, tmp_path, monkeypatch, arguments, what):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(corpus=corpus, prepared=prepared, run=run) for a in arguments]
    assert what in refused(capsys, *filled)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags, notes",
    [
        (["--strategy", "none", "--graph-layers", "3", "--gamma-emotion", "2"],
         ["--graph-layers: of no effect: strategy none has no emotion graph",
          "--gamma-emotion: of no effect: strategy none without --emotions predicts none"]),
        (["--model", "mime", "--literal-thresholds", "--max-relevant", "3"],
         ["--literal-thresholds, --max-relevant: of no effect: model mime has no emotion graph"]),
        (["--ablate", "co-loss", "--gamma-correlation", "2"],
         ["--gamma-correlation: of no effect: --ablate co-loss leaves that loss out"]),
        (["--strategy", "hard", "--max-relevant", "3", "--graph-layers", "3"], []),
    ],
)  # fmt: skip
def test_flags_without_effect_are_named(prepared, capsys, tmp_path, flags, notes):
    """They are not refused: `ecore reproduce --plan` gives all runs of a table the same flags."""
    arguments = ["train", "--data", prepared, "--out", tmp_path / "run", *SMALL, "--max-steps", 1, *flags]
    assert cli.main([str(a) for a in arguments]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "of no effect" in line] == notes


@pytest.mark.parametrize(
    "name", ["config.json", "vocabulary.json", "checkpoints.json", "metrics.jsonl", "weights"]
)
def test_a_run_and_its_data_are_not_overwritten(run, prepared, capsys, name):
    path = next(run.glob("*.safetensors")) if name == "weights" else run / name
    before = path.read_bytes()
    line = refused(capsys, "chat", run, "--transcript", path)
    assert f"--transcript: {path}: would overwrite what it is made from" in line
    assert f"--out: {path}: would" in refused(capsys, "generate", run, "--split", "test", "--out", path)
    texts = prepared / "test.texts.jsonl"
    assert f"--out: {texts}: would" in refused(capsys, "generate", run, "--split", "test", "--out", texts)
    assert path.read_bytes() == before


def test_nothing_is_fetched_for_a_folder_that_cannot_be_made(prepared, capsys, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr("ecore.data.corpus.download", fetched.append)
    line = refused(capsys, "prepare", "--data", tmp_path / "ed", "--download", "--out", prepared)
    assert "exists already" in line
    assert not fetched


def test_labels_are_not_overwritten_by_what_is_made_of_them(prepared, capsys, tmp_path):
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"conv_id": "test0", "emotions": ["afraid", "sad"]}\n')
    before = labels.read_bytes()
    arguments = ["annotate", "run", "--data", prepared, "--annotator", "file", "--labels", labels]
    assert "would overwrite what it is made from" in refused(capsys, *arguments, "--out", tmp_path)
    assert labels.read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(run, capsys):
    assert "--device cuda" in refused(capsys, "chat", run, "--device", "cuda")


def test_checkpoint_of_another_vocabulary(run, prepared, corpus, capsys, tmp_path):
    other = tmp_path / "other"
    options = ["--vocabulary", "train", "--min-count", "10"]
    assert cli.main(["prepare", "--data", str(corpus), "--out", str(other), *options]) == 0
    line = refused(capsys, "generate", run, "--split", "test", "--out", tmp_path / "a.jsonl", "--data", other)
    assert "vocabulary" in line
    assert "vocabulary" in refused(capsys, "train", "--data", other, "--out", run, "--resume")


def test_messages_hold_no_control_characters(capsys, tmp_path):
    (tmp_path / "p.jsonl").write_text("\x1b[2J\x07 [\n")
    (tmp_path / "\x1b[31m").mkdir()
    line = refused(capsys, "evaluate", "--predictions", tmp_path / "\x1b[31m/none.jsonl")
    assert line.isprintable()
    assert "\\x1b[31m/none.jsonl: no such file" in line


def test_what_is_no_text_is_refused(capsys):
    assert "\\udcff: expected UTF-8" in refused(capsys, "info", os.fsdecode(b"\xff"))


def test_errors_of_the_disk_name_the_file(capsys, monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device", str(tmp_path / "a"))

    monkeypatch.setattr("ecore.evaluation.predictions.evaluate_file", full)
    assert (
        refused(capsys, "evaluate", "--predictions", "x")
        == f"ecore: error: {tmp_path}/a: No space left on device"
    )


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["chat", "run", "--method", "best"], "ecore chat: error: argument --method: invalid choice: 'best'"),
        (
            ["train", "--max-steps", "ten"],
            "ecore train: error: argument --max-steps: invalid int value: 'ten'",
        ),
        (["talk"], "ecore: error: argument COMMAND: invalid choice: 'talk'"),
        (["info", "run", "a\nb\x1b[2J"], "ecore: error: unrecognized arguments: a b\\x1b[2J; "),
        ([], "ecore: error: the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, arguments, what):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(what)
    assert line.endswith(f"; `{line.partition(': error:')[0]} --help` lists what there is")


def test_a_folder_around_a_run_names_the_run(run, prepared, capsys, tmp_path):
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "run").symlink_to(run)
    line = refused(capsys, "chat", tmp_path / "around")
    assert line.endswith(f"expected the folder of a run; did you mean {tmp_path / 'around' / 'run'}?")
    assert refused(capsys, "chat", prepared).endswith(
        "expected the folder of a run, which `ecore train` writes"
    )
