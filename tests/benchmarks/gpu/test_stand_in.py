"""The dress rehearsal's device: what is meant for a GPU happens on the CPU."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import stand_in
from benchmarks.gpu.stages import Plan
from ecore.data.prepared import PreparedData


@pytest.fixture
def device():
    with contextlib.ExitStack() as patches:
        stand_in.stand_in(patches)
        yield


def test_tensors_for_a_gpu_are_made_on_the_cpu(device):
    assert torch.cuda.is_available()
    for made in (
        torch.randn(3, device="cuda"),
        torch.zeros(3).to("cuda:0"),
        torch.zeros(3).to(torch.device("cuda"), non_blocking=True).pin_memory(),
        torch.nn.Linear(2, 2).to("cuda").weight,
        torch.rand(2, device="cuda", generator=torch.Generator("cuda").manual_seed(1)),
    ):
        assert made.device.type == "cpu"
    with torch.autocast("cuda", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_everything_is_put_back():
    with contextlib.ExitStack() as patches:
        before = (torch.cuda.is_available, torch.autocast, torch.Generator)
        stand_in.stand_in(patches)
    assert (torch.cuda.is_available, torch.autocast, torch.Generator) == before
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1, device="cuda")


def test_a_command_runs_with_its_own_flags(tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    out = tmp_path / "otsu.json"
    assert stand_in.main(["benchmarks.otsu", "--device", "cuda", "--out", str(out)]) == 0
    assert "PyTorch / native" in capsys.readouterr().out
    assert out.exists()
    torch.set_num_threads(threads)


def test_tuning_writes_what_it_finds(tmp_path, monkeypatch):
    """Entry by entry, and the launch table stays as it is."""
    pytest.importorskip("triton")
    from ecore_kernels.triton_kernels import launch

    table, out = launch.TABLE.read_bytes(), tmp_path / "tune.json"
    threads = torch.get_num_threads()
    flags = ["--kernels", "edge_readout_forward", "--arithmetic", "tf32", "--budget", "0.01"]
    assert stand_in.main(["benchmarks.tune", *flags, "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    (row,) = json.loads(out.read_text())["results"]
    assert (row["kernel"], row["arithmetic"], row["depth"]) == ("edge_readout_forward", "tf32", 2)
    assert row["best"] == row["before"], "no time for another"
    assert row["seconds"] == row["seconds_before"] > 0.0
    assert launch.TABLE.read_bytes() == table


def test_sanitizer_runs_what_it_would_watch(session):
    session.environment = {**session.environment, "PATH": os.environ["PATH"]}
    plan = stand_in.prepared(session, Plan())
    assert not session.failures
    assert len(PreparedData.load(plan.data).train)
    command = [
        "compute-sanitizer",
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        "sh",
        "-c",
        "echo ran; exit 3",
    ]
    path = session.environment["PATH"]
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "ran\n")


@pytest.mark.parametrize("module", ["ecore", "ecore_kernels.verify", "benchmarks.training"])
def test_commands_of_the_stages_start(module):
    """It finds a module's main as the interpreter's -m does."""
    command = [sys.executable, "-m", "benchmarks.gpu.stand_in", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("usage: ")
