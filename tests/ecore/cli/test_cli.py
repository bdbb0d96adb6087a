"""The command line: the whole way from a corpus to an answer."""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ecore import cli
from ecore.data.intensity import SOURCES
from ecore.data.vocabulary import VOCABULARIES
from ecore.paper.published import EXPERIMENTS
from ecore.pipeline import ECore
from ecore.precision import settle
from ecore.training.journal import read_metrics
from tests.ecore.cli.commands import ROOT, SMALL, python, refused

COMMANDS = (
    *("prepare", "train", "evaluate", "compare", "generate", "chat", "export", "web", "serve"),
    *("figures", "human", "reproduce", "annotate", "demo", "info"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert f"ecore {command}" in page.split("examples:")[1]


def test_help_is_quick():
    code = "import sys; from ecore import cli\n"
    for arguments in (["--help"], ["prepare", "--help"], ["generate", "--help"], ["reproduce", "--help"]):
        code += f"try: cli.main({arguments})\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    assert python("-c", code).stdout.splitlines()[-1] == "False"


def test_choices_are_the_librarys():
    parser = argparse.ArgumentParser()
    cli.prepare.declare_prepare(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["intensity"] == SOURCES
    assert choices["vocabulary"] == VOCABULARIES
    parser = argparse.ArgumentParser()
    cli.reproduce.declare_reproduce(parser)
    assert {a.dest: a.choices for a in parser._actions}["what"] == (*EXPERIMENTS, "all")


def test_train_says_what_it_trains(prepared, capsys, tmp_path):
    arguments = [
        "--strategy",
        "hard",
        "--ablate",
        "co-p",
        "co-loss",
        "--ablate",
        "gen-loss",
        "--literal-thresholds",
    ]
    out = tmp_path / "run"
    assert (
        cli.main(
            ["train", "--data", str(prepared), "--out", str(out), *SMALL, *arguments, "--max-steps", "2"]
        )
        == 0
    )
    said = " ".join(capsys.readouterr().err.split())
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["ablations"] == ["co-p", "co-loss", "gen-loss"]
    assert config["model"]["thresholds"] == [0.0, 0.075, 0.15]
    for part in (
        "parameters (preset tiny)",
        "hard strategy, without co-p, co-loss, gen-loss",
        "thresholds 0, 0.075",
    ):
        assert part in said
    for part in ("literature vocabulary", "on cpu, 1 CPU threads"):
        assert part in said


def test_precision_that_is_measured(prepared, capsys, tmp_path, monkeypatch):
    """The run has the one that was found, and can be continued with the same flags."""
    seconds = {"float32": 0.2, "bfloat16": 0.46}
    monkeypatch.setattr(
        "ecore.training.trainer.settle",
        lambda precision, device: settle(precision, device, lambda _, names: {n: seconds[n] for n in names}),
    )
    new = ["train", "--data", str(prepared), *SMALL, "--max-steps", "1", "--out"]
    for precision, kept, message in (
        ("auto", "float32", "--precision auto: float32 has the fastest products here"),
        (
            "bfloat16",
            "bfloat16",
            "--precision bfloat16: products take 2.3 times as long as in float32 on this CPU",
        ),
    ):
        out = tmp_path / precision
        assert cli.main([*new, str(out), "--precision", precision]) == 0
        assert message in capsys.readouterr().err
        assert json.loads((out / "config.json").read_text())["training"]["precision"] == kept
    again = ["train", "--out", str(tmp_path / "auto"), "--resume", "--precision", "auto", "--max-steps", "2"]
    assert cli.main(again) == 0
    assert "--precision" not in capsys.readouterr().err


def test_thresholds_are_matched_to_the_data(run, prepared):
    matched = json.loads((prepared / "meta.json").read_text())["thresholds"]
    thresholds = json.loads((run / "config.json").read_text())["model"]["thresholds"]
    assert thresholds == [0.0, matched["0.075"], matched["0.15"]]


def test_resume(run, prepared, capsys, tmp_path):
    folder = tmp_path / "run"
    assert cli.main(["train", "--data", str(prepared), "--out", str(folder), *SMALL, "--max-steps", "2"]) == 0
    assert cli.main(["train", "--out", str(folder), "--resume", "--max-steps", "3"]) == 0
    assert read_metrics(folder)[-1]["step"] == 3
    assert cli.main(["train", "--out", str(folder), "--resume", "--preset", "tiny", "--dim", "12"]) == 0
    for flag, value in (("--dim", 24), ("--strategy", "hard"), ("--preset", "paper"), ("--seed", 3)):
        line = refused(capsys, "train", "--out", folder, "--resume", flag, value)
        assert flag in line
        assert "only --max-steps may change" in line
    line = refused(capsys, "train", "--out", folder, "--resume", "--ablate", "co-p")
    assert "--ablate" in line
    refused(capsys, "train", "--out", folder, "--resume", "--literal-thresholds")


def test_evaluate(run, capsys, tmp_path):
    assert (
        cli.main(["evaluate", str(run), "--out", str(tmp_path / "e"), "--limit", "4", "--batch-size", "2"])
        == 0
    )
    assert "ppl_per_sample" in capsys.readouterr().out
    assert (tmp_path / "e").is_dir()


def test_generate_a_split_and_score_it(run, capsys, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert cli.main(["generate", str(run), "--split", "valid", "--out", str(out), "--limit", "3"]) == 0
    assert len(out.read_text().splitlines()) == 3
    assert cli.main(["evaluate", "--predictions", str(out)]) == 0
    assert "Dist-1" in capsys.readouterr().out


def test_generate_text(run, capsys):
    words = ["--text", "My dog died.", "--text", "Oh no.", "--text", "He was old."]
    assert (
        cli.main(["generate", str(run), *words, "--method", "beam", "--beams", "2", "--max-length", "4"]) == 0
    )
    answer, perceived = capsys.readouterr().out.splitlines()
    turns = words[1::2]
    reply = ECore.from_pretrained(run).respond(turns, method="beam", beams=2, max_length=4)
    assert answer == reply
    assert perceived.startswith(f"perceived: {reply.emotions[0][0]} ")


def test_weights_of_few_bits(run, capsys, tmp_path):
    """Every command that answers has the flag."""
    said = "My dog died."
    assert cli.main(["generate", str(run), "--text", said, "--weights", "int8"]) == 0
    model = ECore.from_pretrained(run).quantize("int8")
    assert capsys.readouterr().out.splitlines()[0] == model.respond(said)
    scored = ["evaluate", str(run), "--out", str(tmp_path / "e"), "--limit", "3"]
    assert cli.main([*scored, "--weights", "bfloat16"]) == 0
    assert "greedy, weights bfloat16, at most 30 words" in capsys.readouterr().out
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["weights"] == "bfloat16"
    for command in ("chat", "serve", "web"):
        assert cli._parser(command).parse_args([command, "run"]).weights == "float32"


def test_chat_remembers_resets_and_leaves(run, capsys, monkeypatch):
    heard = []
    respond = ECore.respond

    def spied(self, turns, **options):
        heard.append(list(turns))
        return respond(self, turns, **options)

    monkeypatch.setattr(ECore, "respond", spied)
    lines = "My dog died.\n\nHe was old.\n/what\n/reset\nWe won!\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert cli.main(["chat", str(run), "--max-length", "3"]) == 0
    out = capsys.readouterr().out
    assert [len(turns) for turns in heard] == [1, 3, 1]
    assert heard[1][0] == "My dog died."
    assert heard[1][1] in out
    assert out.count(" %") == 9

    monkeypatch.setattr(sys, "stdin", io.StringIO("We won!\n"))
    assert cli.main(["chat", str(run)]) == 0

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9!\n"), encoding="utf-8"))
    assert cli.main(["chat", str(run)]) == 0
    assert heard[-1] == ["caf\ufffd!"]

    def ctrl_c(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", ctrl_c)
    assert cli.main(["chat", str(run)]) == 0


def test_info(run, capsys):
    assert cli.main(["info", str(run)]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "step 6 of 6" in out


def edited(run, folder, change):
    """A copy of ``run`` with a changed config.json; who edits a file deletes its checksum."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["checksum"]
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_info_of_edited_files(run, capsys, tmp_path):
    folder = edited(run, tmp_path / "run", lambda config: config["data"].pop("vocabulary_size"))
    (folder / "metrics.jsonl").write_text(
        '{"step": 1}\n{"step": 6, "loss": null, "valid_ppl_per_sample": 3.0}\n'
    )
    assert cli.main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "unknown words" in out
    assert "step 6 of 6: loss unknown" in out
    assert "perplexity unknown per token, 3.00 per sample" in out


def test_a_run_of_python_code_has_a_preset_of_any_name(run, capsys, tmp_path):
    folder = edited(run, tmp_path / "own", lambda config: config.update(preset="my own"))
    arguments = ["train", "--out", str(folder), "--resume", "--thresholds", "0", "0.075", "0.15"]
    assert cli.main(arguments) == 0
    folder = edited(run, tmp_path / "list", lambda config: config.update(preset=["tiny"]))
    assert "preset: expected a name, got ['tiny']" in refused(capsys, "train", "--out", folder, "--resume")
    folder = edited(run, tmp_path / "auto", lambda config: config["training"].update(precision="auto"))
    line = refused(capsys, "train", "--out", folder, "--resume")
    assert "precision: expected the one that was found, got 'auto'" in line


def test_ctrl_c_leaves_a_run_to_go_on_with(prepared, tmp_path):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [
        sys.executable,
        "-m",
        "ecore",
        "train",
        "--data",
        prepared,
        "--out",
        out,
        *SMALL,
        "--max-steps",
        "100000",
    ]
    process = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or not read_metrics(out):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"go on with: ecore train --out {out} --resume" in said
    step = json.loads((out / "checkpoints.json").read_text())["last"].removeprefix("checkpoint-")
    assert (
        cli.main(
            ["train", "--out", str(out), "--resume", "--max-steps", str(int(step) + 1), "--threads", "1"]
        )
        == 0
    )


def test_the_plain_transformer_all_the_way(prepared, tmp_path, capsys):
    """Strategy none trains, is evaluated and answers; nobody tells an emotion that it does not perceive."""
    run = tmp_path / "run"
    flags = [*SMALL, "--strategy", "none", "--max-steps", "3", "--log-every", "1"]
    assert cli.main(["train", "--data", str(prepared), "--out", str(run), *flags]) == 0
    assert all("emotion_accuracy" not in line for line in read_metrics(run))
    assert cli.main(["evaluate", str(run)]) == 0
    assert cli.main(["generate", str(run), "--text", "A noise scared me."]) == 0
    assert cli.main(["info", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "ppl_per_sample" in printed
    assert "Acc" not in printed
    assert "perceived" not in printed
    ablated = ["--ablate", "co-p", "--strategy", "none", "--out", str(tmp_path / "other")]
    assert cli.main(["train", "--data", str(prepared), *ablated]) == 2


def test_evaluate_multi_emotion(run, tmp_path, capsys):
    """Labelled dialogues are scored beside the rest; labels that do not fit are refused before any work."""
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    labels = tmp_path / "labels.jsonl"
    labels.write_text(json.dumps({"conv_id": "test0", "emotions": ["afraid", "sad"]}) + "\n")
    assert cli.main(["evaluate", str(copied), "--multi-emotion", str(labels)]) == 0
    assert "multi-emotion subset: 1 conversations" in capsys.readouterr().out
    kept = json.loads((copied / "evaluation-test" / "metrics.json").read_text())["multi_emotion"]
    assert kept["ceiling_at"] == {"1": 1.0, "3": 2.0, "5": 2.0}
    predictions = str(copied / "evaluation-test" / "predictions.jsonl")
    assert cli.main(["evaluate", "--predictions", predictions, "--multi-emotion", str(labels)]) == 0
    assert cli.main(["evaluate", str(copied), "--multi-emotion", str(labels), "--limit", "2"]) == 2
    labels.write_text(json.dumps({"conv_id": "nobody", "emotions": ["afraid", "sad"]}) + "\n")
    assert cli.main(["evaluate", str(copied), "--multi-emotion", str(labels)]) == 2
    assert "labels.jsonl:1: no conversation 'nobody'" in capsys.readouterr().err
