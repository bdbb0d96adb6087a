"""Losses of recorded steps against single ones, here with a stand-in for CUDA graphs."""

import json
import math

import pytest
import torch

from benchmarks import recorded
from benchmarks.recorded import TOLERANCE
from tests.benchmarks.small import small_workload

SMALL = {"dim": 24, "feed_forward": 32}


class Again:
    """In a CUDA graph's place: the step once more."""

    def warm_up(self, work):
        return work()

    def record(self, work):
        return work


class Stale(Again):
    """A broken one, which takes no step when it is replayed."""

    def record(self, work):
        taken = work()
        return lambda: taken


class Refusing(Again):
    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.fixture(scope="module")
def small():
    with small_workload("paper", batch_size=4, number=4) as workload:
        yield workload


def test_recorded_single_and_plain_steps_agree(small):
    rows = recorded.compare(small, "float32", 8, "cpu", Again(), **SMALL)
    assert [row["compared"] for row in rows] == ["single / plain PyTorch", "recorded / single"]
    for row in rows:
        assert row["passed"]
        assert row["difference"] < 2e-4
        assert row["tolerance"] == TOLERANCE["float32"]
        assert math.isfinite(row["last"][0])
    assert rows[0]["difference"] > 0.0, "the ways differ"


def test_a_recording_that_does_not_do_the_step_fails(small):
    single, replayed = recorded.compare(small, "float32", 8, "cpu", Stale(), **SMALL)
    assert single["passed"]
    assert not replayed["passed"]
    assert replayed["difference"] > TOLERANCE["float32"]
    assert "BEYOND THE TOLERANCE" in recorded.report([single, replayed])


def test_a_recording_that_fails_is_reported_and_the_rest_compared(small):
    single, failed = recorded.compare(small, "bfloat16", 8, "cpu", Refusing(), **SMALL)
    assert single["passed"]
    assert failed["failed"] == "recorded: RuntimeError: operation not permitted when stream is capturing"
    assert not failed["passed"]
    assert failed["failed"] in recorded.report([single, failed])


def test_steps_that_never_were_recorded_are_a_failure(small):
    """A shape that comes once shows nothing."""
    _, row = recorded.compare(small, "float32", 1, "cpu", Again(), **SMALL)
    assert row["failed"] == "recorded: RuntimeError: of 1 shapes of batches 0 were recorded"


def test_a_loss_that_is_no_number_fails(small, monkeypatch):
    monkeypatch.setattr(recorded, "losses", lambda *_, **__: [1.0, math.nan])
    rows = recorded.compare(small, "tf32", 2, "cpu")
    assert not any(row["passed"] for row in rows)


@pytest.mark.parametrize("recorder, code", [(Again(), 0), (Stale(), 1)])
def test_the_command(small, monkeypatch, tmp_path, capsys, recorder, code):
    compare, out = recorded.compare, tmp_path / "losses.json"

    def on_the_cpu(work, precision, steps, device):
        if precision != "float32":  # rows are written as they come
            assert json.loads(out.read_text())["results"]
        with monkeypatch.context() as without:  # torch 2.15's optimizers ask the GPU that seems to be there
            without.setattr(torch.cuda, "is_available", lambda: False)
            return compare(work, "float32", steps, "cpu", recorder, **SMALL)

    monkeypatch.setattr(recorded, "compare", on_the_cpu)
    monkeypatch.setattr(recorded, "workload", lambda *_, number: small)
    monkeypatch.setattr("benchmarks.harness.machine", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert recorded.main(["--steps", "8", "--out", str(out)]) == code
    assert len(json.loads(out.read_text())["results"]) == 6
    assert "recorded / single" in capsys.readouterr().out
