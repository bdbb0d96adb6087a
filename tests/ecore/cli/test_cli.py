"""The command line: the whole way from a corpus to an answer, and one clear line for what goes wrong."""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ecore import cli
from ecore.data.intensity import SOURCES
from ecore.data.vocabulary import VOCABULARIES
from ecore.paper.published import EXPERIMENTS
from ecore.pipeline import ECore
from ecore.precision import settle
from ecore.training.journal import read_metrics

COMMANDS = (
    *("prepare", "train", "evaluate", "compare", "generate", "chat", "export", "web", "serve"),
    *("figures", "human", "reproduce", "annotate", "demo", "info"),
)
ROOT = Path(__file__).parents[3]
SMALL = [
    "--preset",
    "tiny",
    "--dim",
    "12",
    "--feed-forward",
    "16",
    "--batch-size",
    "8",
    "--warmup",
    "5",
    "--threads",
    "1",
]


@pytest.fixture(scope="module", autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "corpus"
    folder.mkdir()
    said = {"afraid": "A noise scared me.", "joyful": "We won the game!", "sad": "My dog died."}
    for split, number in (("train", 12), ("valid", 3), ("test", 3)):
        lines = []
        for i in range(number):
            emotion = sorted(said)[i % 3]
            texts = [said[emotion], "Tell me more.", "It was last night.", "I see."]
            utterances = [{"speaker": ("speaker", "listener")[t % 2], "text": x} for t, x in enumerate(texts)]
            lines.append(
                {
                    "conv_id": f"{split}{i}",
                    "emotion": emotion,
                    "situation": texts[0],
                    "utterances": utterances,
                }
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def prepared(corpus):
    assert cli.main(["prepare", "--data", str(corpus), "--out", str(corpus.parent / "prepared")]) == 0
    return corpus.parent / "prepared"


@pytest.fixture(scope="module")
def run(prepared):
    folder = prepared.parent / "run"
    assert cli.main(["train", "--data", str(prepared), "--out", str(folder), *SMALL, "--max-steps", "6"]) == 0
    return folder


def refused(capsys, *arguments, code=2):
    """The one line that the command prints; any traceback would be an exception here."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("ecore: error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err + out
    return lines[0]


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


def python(*arguments, **options):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def test_choices_are_the_librarys():
    parser = argparse.ArgumentParser()
    cli.prepare.declare_prepare(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["intensity"] == SOURCES
    assert choices["vocabulary"] == VOCABULARIES
    parser = argparse.ArgumentParser()
    cli.reproduce.declare_reproduce(parser)
    assert {a.dest: a.choices for a in parser._actions}["what"] == (*EXPERIMENTS, "all")


def test_train_tells_what_it_trains(prepared, capsys, tmp_path):
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
