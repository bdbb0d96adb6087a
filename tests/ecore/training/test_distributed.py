"""Several processes train as one does: the same samples, averaged gradients, losses; files written once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ecore.model.pretrained import weights_file
from ecore.training.journal import read_metrics

ROOT = Path(__file__).parents[3]
# Batches of 5 of 48 samples: shares of 3 and 2, and a last batch of 3.
FLAGS = [
    "--preset",
    "tiny",
    "--dim",
    "12",
    "--feed-forward",
    "16",
    "--dropout",
    "0",
    "--graph-dropout",
    "0",
    "--batch-size",
    "5",
    "--max-steps",
    "12",
    "--validate-every",
    "6",
    "--log-every",
    "1",
    "--warmup",
    "5",
    "--threads",
    "1",
    "--literal-thresholds",
]


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    return torchrun(processes, "-m", "ecore", "train", *arguments)


def torchrun(processes: int, *program: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run(
        [*command, *program], env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT
    )


@pytest.fixture(scope="module")
def alone(prepared_folder, tmp_path_factory):
    """A run by one process, without torchrun."""
    run = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "ecore", "train", "--data", str(prepared_folder), "--out", str(run)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    subprocess.run([*command, *FLAGS], env=environment, check=True, timeout=300, cwd=ROOT)
    return run


def compare(run: Path, other: Path) -> None:
    lines, wanted = read_metrics(run), read_metrics(other)
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, one in zip(lines, wanted, strict=True):
        names = [name for name in one if name.startswith("valid_ppl")]
        for name in (
            "loss",
            "generation",
            "emotion",
            "correlation",
            "nll_per_token",
            "emotion_accuracy",
            *names,
        ):
            assert line[name] == pytest.approx(one[name], rel=2e-5, abs=1e-6), (name, line["step"])
    weights, others = (load_file(weights_file(folder, "last")) for folder in (run, other))
    for name, value in weights.items():
        if name.endswith("key.bias"):
            continue  # it shifts a row's scores alike: its gradient is rounding, which Adam makes a step of
        # As a whole: Adam takes as large a step where a gradient is all but zero, rounding included, as elsewhere.
        wanted = others[name].double()
        assert (value.double() - wanted).norm() <= 3e-4 * wanted.norm(), name


@pytest.mark.parametrize("strategy", ["soft", "hard"])
def test_two_processes_train_as_one(prepared_folder, alone, tmp_path, strategy):
    out, flags = str(tmp_path / "run"), [*FLAGS, "--strategy", strategy]
    if strategy == "hard":
        alone = tmp_path / "alone"
        assert launch(1, "--data", str(prepared_folder), "--out", str(alone), *flags).returncode == 0
    result = launch(2, "--data", str(prepared_folder), "--out", out, *flags)
    assert result.returncode == 0, result.stderr
    compare(tmp_path / "run", alone)
    assert result.stdout.count("best validation perplexity") == 1


def test_resumed_by_the_same_number_is_as_never_stopped(prepared_folder, tmp_path):
    """With dropout: each process's random numbers go on."""
    flags = [*FLAGS, "--dropout", "0.3"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for run, steps in ((whole, "12"), (stopped, "7")):
        result = launch(2, "--data", str(prepared_folder), "--out", str(run), *flags, "--max-steps", steps)
        assert result.returncode == 0, result.stderr
    result = launch(2, "--out", str(stopped), "--resume", "--max-steps", "12")
    assert result.returncode == 0, result.stderr
    assert [line["loss"] for line in read_metrics(stopped)] == [line["loss"] for line in read_metrics(whole)]
    # And one process may take over.
    result = launch(1, "--out", str(stopped), "--resume", "--max-steps", "14")
    assert result.returncode == 0, result.stderr
    assert read_metrics(stopped)[-1]["step"] == 14


def test_bad_input_is_told_once(tmp_path):
    result = launch(2, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"))
    assert result.returncode != 0
    assert result.stderr.count("ecore: error:") == 1


@pytest.mark.parametrize("fails", ["both", "second"])
def test_the_first_process_may_be_slow_or_well(tmp_path, fails):
    """The first is 3 s late, or has nothing to say; the second leaves it 0.5 s in the latter case."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys, time
import ecore.cli

if os.environ["RANK"] == "0":
    time.sleep({3 if fails == "both" else 60})
elif {fails == "second"}:
    ecore.cli._FIRST_SPEAKS = 0.5
sys.exit(ecore.cli.main(["train", "--data", "nowhere" + os.environ["RANK"], "--out", "run"]))
""")
    result = torchrun(2, str(script))
    assert result.returncode != 0
    told = [line for line in result.stderr.splitlines() if line.startswith("ecore: error:")]
    assert len(told) == 1
    assert ("nowhere0" if fails == "both" else "nowhere1") in told[0]
