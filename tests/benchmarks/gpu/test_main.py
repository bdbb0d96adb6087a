"""Arguments, exit codes and signals of the one command."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import stages
from benchmarks.gpu.runner import ROOT, Process
from benchmarks.gpu.stages import PAPER_STEPS, STAGES
from ecore.data.prepare import prepare
from ecore.demo import sample_corpus


@pytest.fixture
def calls(monkeypatch):
    """The calls of the stages, on a machine that has a GPU and an extension."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("benchmarks.harness.machine", lambda: {"gpu": "a GPU"})
    monkeypatch.setattr(command, "has_extension", lambda *_: True)
    monkeypatch.setattr(command, "Process", lambda name, *_: Process(name, ["true"], 20.0))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(stages, "run", lambda session, plan, minutes: seen.append((session, plan, minutes)))
    return seen


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "prepared"
    prepare(sample_corpus(), folder, vocabulary="train", progress=False)
    return folder


def test_defaults(calls, tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == 0
    ((_, plan, minutes),) = calls
    assert list(minutes) == [name for name in STAGES if name != "train"]
    assert all(minutes[name] == STAGES[name].minutes for name in minutes)
    assert (plan.data, plan.strategies, plan.steps, plan.rehearsal) == (None, ["soft"], PAPER_STEPS, False)
    assert "without --data there is no training: the stage train is not run" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"summary.json", "summary.md", "log.txt"}


def test_stages_and_limits(calls, data, tmp_path):
    flags = [
        "--stages",
        "train,smoke",
        "--minutes",
        "7,train=2.5",
        "--data",
        str(data),
        "--strategy",
        "none,soft",
    ]
    assert command.main([*flags, "--steps", "90", "--keep-weights", "--out", str(tmp_path)]) == 0
    ((session, plan, minutes),) = calls
    assert list(minutes.items()) == [("smoke", STAGES["smoke"].minutes), ("train", 2.5)]
    assert session.begin_stage("smoke", 60 * 99)
    assert 400.0 < session.left() <= 420.0
    assert (plan.strategies, plan.steps, plan.keep_weights) == (["none", "soft"], 90, True)
    assert plan.data == data.resolve()


def test_a_failure_is_in_the_exit_code(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "run", lambda session, *_: session.leave_out("there is none"))
    assert command.main(["--stages", "smoke", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "summary.json").read_text())["failures"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--stages", "smoke,walk"], f"--stages: expected some of {','.join(STAGES)}, got 'walk'"),
        (["--stages", "train"], "--stages: train: expected --data with a folder made by `ecore prepare`"),
        (["--minutes", "steps=0"], "--minutes: expected a number of minutes over 0, got '0'"),
        (["--minutes", "many"], "--minutes: expected a number of minutes over 0, got 'many'"),
        (["--minutes", "3,4"], "--minutes: two limits of everything together: 3 and 4"),
        (
            ["--stages", "smoke,steps", "--minutes", "tune=3"],
            "--minutes: tune: expected one of the stages to run: smoke,steps",
        ),
        (
            ["--data", "PREPARED", "--strategy", "softer"],
            "--strategy: expected some of soft,hard,none, got 'softer'",
        ),
        (["--data", "PREPARED", "--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--keep-weights"], "--keep-weights: is of the stage train, which is not run"),
        (
            ["--data", "PREPARED", "--stages", "smoke", "--steps", "9"],
            "--steps: is of the stage train, which is not run",
        ),
        (["--data", "/no/such"], "--data: /no/such"),
    ],
)
def test_bad_arguments_get_one_line_before_any_work(calls, data, tmp_path, capsys, flags, said):
    flags = [str(data) if flag == "PREPARED" else flag for flag in flags]
    assert command.main([*flags, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gpu: {said}")
    assert not calls
    assert not (tmp_path / "out").exists()


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "gpu: torch sees no CUDA device here; --rehearse runs everything on a CPU\n"
    )
    assert not (tmp_path / "out").exists()


def test_list(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(STAGES)
    assert float(lines[-1].split()[1]) == sum(stage.minutes for stage in STAGES.values())


def test_where_results_go():
    assert command.default_folder("NVIDIA H200") == ROOT / "benchmarks" / "results" / "nvidia-h200"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_everything_and_leaves_its_summary(ends, tmp_path, kind):
    """The whole command, in a process of its own, with a stage that would not end."""
    started = tmp_path / "pid"
    started.touch()
    script = f"""
import sys
from benchmarks.gpu import __main__ as command, stages
from benchmarks.gpu.runner import Process
code = "import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(f'{{os.getpid()}}'); time.sleep(60)"
def hang(session, plan):
    session.run(Process("hanging", [sys.executable, "-c", code], 50.0))
stages.STAGES["smoke"] = stages.Stage(1, "", hang)
command.has_extension = lambda *_: True
command.Process = lambda name, *_: Process(name, ["true"], 20.0)
import torch
torch.cuda.is_available = lambda: True
from benchmarks import harness
harness.machine = dict
sys.exit(command.main(["--stages", "smoke,tune", "--out", {str(tmp_path / "out")!r}]))
"""
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while not started.read_text():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(kind)
    assert child.wait(60) == 130
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    outcomes = {record["step"]: record["outcome"] for record in summary["steps"]}
    assert outcomes["hanging"] == "interrupted"
    assert outcomes["tune"] == "left out: interrupted"
    assert ends(int(started.read_text()))
