"""Several processes train as one does: the same samples, averaged gradients, losses; files written once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ecore.training import distributed
from ecore.training.distributed import Parted, parted
from ecore.training.journal import read_metrics
from tests.ecore.training.processes import ROOT, compare, in_turn, python_path, resume, train


def launch(processes: int, folder: Path, *commands: list[str]) -> subprocess.CompletedProcess:
    """Run commands one after the other in the same processes."""
    return torchrun(processes, str(in_turn(folder, *commands)))


def torchrun(processes: int, *program: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return subprocess.run(
        [*command, *program], env=python_path(), capture_output=True, text=True, timeout=300, cwd=ROOT
    )


@pytest.fixture(scope="module")
def alone(prepared_folder, tmp_path_factory):
    """By strategy, a run by one process: without torchrun."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {strategy: folder / strategy for strategy in ("soft", "hard")}
    script = "from ecore.cli import main\n"
    script += "".join(
        f"assert not main({train(prepared_folder, run, '--strategy', strategy)!r})\n"
        for strategy, run in runs.items()
    )
    subprocess.run([sys.executable, "-c", script], env=python_path(), check=True, timeout=300, cwd=ROOT)
    return runs


@pytest.fixture(scope="module")
def together(prepared_folder, tmp_path_factory):
    """The folder of runs by two processes; every command says how well it went, once.

    There are one for each strategy, and with dropout one that never stopped and one that was resumed. The last is
    resumed after all others, so that no random numbers that a process happens to be at are those that go on.
    """
    folder = tmp_path_factory.mktemp("together")
    dropout = "--dropout", "0.3"
    commands = [
        train(prepared_folder, folder / "stopped", *dropout, "--max-steps", "7"),
        *(train(prepared_folder, folder / strategy, "--strategy", strategy) for strategy in ("soft", "hard")),
        train(prepared_folder, folder / "whole", *dropout),
        resume(folder / "stopped", 12),
    ]
    result = launch(2, folder, *commands)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("best validation perplexity") == len(commands)
    return folder


@pytest.mark.parametrize("strategy", ["soft", "hard"])
def test_two_processes_train_as_one(alone, together, strategy):
    compare(together / strategy, alone[strategy])


def test_resumed_by_the_same_number_is_as_never_stopped(together, tmp_path):
    """With dropout: each process's random numbers go on."""
    whole, stopped = (read_metrics(together / name) for name in ("whole", "stopped"))
    assert [line["loss"] for line in stopped] == [line["loss"] for line in whole]
    # And one process may take over.
    result = launch(1, tmp_path, resume(together / "stopped", 14))
    assert result.returncode == 0, result.stderr
    assert read_metrics(together / "stopped")[-1]["step"] == 14


def test_bad_input_is_reported_once(tmp_path):
    result = torchrun(
        2, "-m", "ecore", "train", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")
    )
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
    errors = [line for line in result.stderr.splitlines() if line.startswith("ecore: error:")]
    assert len(errors) == 1
    assert ("nowhere0" if fails == "both" else "nowhere1") in errors[0]


def test_another_process_that_is_gone_is_one_kind_of_error():
    gloo = RuntimeError(
        "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:1"
    )
    for error in (gloo, torch.distributed.DistNetworkError("the store is gone")):
        with (
            pytest.raises(
                Parted, match="another process of this training has ended; the last checkpoint is kept"
            ),
            parted(),
        ):
            raise error
    with pytest.raises(RuntimeError, match=r"^a bug$"), parted():
        raise RuntimeError("a bug")


def test_no_thread_is_left_in_the_store_when_a_process_leaves(monkeypatch):
    """Python that ends while a thread is inside torch's C++ aborts, and the other host's agent waits for minutes."""
    inside = threading.Event()

    class SlowStore:
        def __init__(self, *_, **__):
            inside.set()
            time.sleep(0.3)

        def set(self, *_):
            pass

        def check(self, _):
            return False

    monkeypatch.setattr(distributed, "BEAT", 0.2)
    monkeypatch.setattr(distributed, "_left", threading.Event())
    monkeypatch.setattr(distributed.dist, "TCPStore", SlowStore)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    before = set(threading.enumerate())
    distributed.join("cpu")
    (watcher,) = set(threading.enumerate()) - before
    assert inside.wait(10)
    distributed.leave()
    assert not watcher.is_alive()
