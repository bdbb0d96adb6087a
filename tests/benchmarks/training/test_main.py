"""The command: what it measures, writes, prints and refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.training import __main__ as command
from benchmarks.training import breakdown
from benchmarks.training.runner import InThisProcess
from benchmarks.training.steps import WITHOUT, Steps, configurations


@pytest.fixture(autouse=True)
def _one_process(small, monkeypatch):
    """Configurations take their steps here: their processes would be of the real size."""

    def start(_, name):
        return InThisProcess(small, configurations(True)[name])

    monkeypatch.setattr(command, "own_process", start)


def test_report(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "workload", lambda *_: small)
    monkeypatch.setattr(breakdown, "PROFILED_STEPS", 1)
    monkeypatch.setattr(breakdown, "peak_memory", lambda *_: 123.0)
    monkeypatch.setattr(
        breakdown, "growth", lambda *_: [{"batch": 1, "context_words": None, "seconds_a_sample": 0.1}]
    )
    out, image = tmp_path / "training.json", tmp_path / "training.svg"
    command.main(["--rounds", "2", "--out", str(out), "--plot", str(image)])
    printed = capsys.readouterr().out
    for name in configurations(False):
        assert name in printed
    kept = json.loads(out.read_text())["results"][0]
    assert [row["configuration"] for row in kept["configurations"]] == list(configurations(False))
    assert kept["configurations"][0]["speedup_median"] == 1.0
    assert kept["parts"]["all"]["graph operators"] > 0.0
    before = image.read_bytes()
    image.unlink()
    command.main(["--from", str(out), "--plot", str(image)])
    assert image.read_bytes() == before


def test_only_what_is_named_is_compiled(small, monkeypatch, capsys):
    monkeypatch.setattr(command, "workload", lambda *_: small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = []
    monkeypatch.setattr(
        command, "Steps", lambda _, parts, device: made.append(parts) or SimpleNamespace(warm_up=list)
    )
    flags = ["--device", "cuda", "--compile-only", "--only"]
    command.main([*flags, "all, torch.compile, tf32"])
    assert made == [[*WITHOUT, "torch.compile", "tf32"]]
    assert capsys.readouterr().out == "compiled: all, torch.compile, tf32\n"
    with pytest.raises(SystemExit):
        command.main([*flags, "everything"])
    assert "got 'everything'" in capsys.readouterr().err


def test_only_what_is_named_is_measured(small, monkeypatch, tmp_path):
    """On a CPU, and on a GPU where plain PyTorch, which the others are compared with, is not among them."""
    monkeypatch.setattr(command, "workload", lambda *_: small)
    monkeypatch.setattr(breakdown, "growth", lambda *_: [])
    monkeypatch.setattr(breakdown, "where_time_goes", lambda *_: dict.fromkeys(("a part",), 1.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def compare_passes(work, named, passes, device, budget):
        asked.append(list(named))
        return [{"configuration": name, "refused": "no time was left"} for name in named]

    monkeypatch.setattr(command, "compare_passes", compare_passes)
    out = tmp_path / "training.json"
    monkeypatch.setattr("benchmarks.harness.machine", dict)
    command.main(["--rounds", "2", "--only", "+ fused optimiser", "--out", str(out)])
    (row,) = json.loads(out.read_text())["results"][0]["configurations"]
    assert (row["configuration"], row["timing"]["measurements"]) == ("+ fused optimiser", 2)
    only = ["all", "all, torch.compile"]
    command.main(["--device", "cuda", "--compile", "--only", *only, "--out", str(out)])
    assert asked == [["all"], ["all, torch.compile"]]
    kept = json.loads(out.read_text())["results"][0]["configurations"]
    assert [row["configuration"] for row in kept] == only


@pytest.mark.parametrize("text", [None, "{", "[]", '{"results": []}', '{"results": [{}]}'])
def test_what_cannot_be_drawn(tmp_path, capsys, text):
    kept = tmp_path / "kept.json"
    if text is not None:
        kept.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--from", str(kept)])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    if text in (None, "{"):
        assert f"error: {kept}: no such file" in last or f"error: {kept}:1: not valid JSON" in last
    else:
        assert f"--from: {kept}: expected results of this benchmark" in last


@pytest.mark.gpu
def test_on_a_gpu(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "workload", lambda *_: small)
    out = tmp_path / "training.json"
    command.main(["--device", "cuda", "--rounds", "2", "--out", str(out)])
    assert "all, CUDA graphs, bfloat16" in capsys.readouterr().out
    kept = json.loads(out.read_text())["results"][0]
    assert kept["parts"]["all"]["matrix products"] > 0.0
    assert all(row["peak_memory_mib"] > 0.0 for row in kept["configurations"])
    captured = Steps(small, [*WITHOUT, "CUDA graphs"], "cuda", dropout=0.0, graph_dropout=0.0)
    plain = Steps(small, [], "cuda", dropout=0.0, graph_dropout=0.0)
    for number in range(50):
        taken, wanted = (float(one.take_number(number)) for one in (captured, plain))
        assert taken == pytest.approx(wanted, rel=1e-3)
