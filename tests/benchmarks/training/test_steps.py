"""The switches of a step never change the mathematics."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from benchmarks.gpu.stand_in import Recordings
from benchmarks.training import steps
from benchmarks.training.steps import WITHOUT, Steps, configurations


def losses(work, parts):
    settings = {"dropout": 0.0, "graph_dropout": 0.0, "dim": 24, "feed_forward": 32}
    one = Steps(work, parts, recorder=Recordings(), **settings)
    return np.array([float(one.take_number(i)) for i in range(50)])


@pytest.fixture(scope="module")
def plain(small):
    return losses(small, [])


@pytest.mark.parametrize(
    "parts",
    [[part] for part in WITHOUT] + [list(WITHOUT), [*WITHOUT, "CUDA graphs"]],
    ids=lambda p: ", ".join(p),
)
def test_fifty_steps_have_the_plain_losses(small, plain, parts):
    assert plain[48] < 0.98 * plain[0]  # the same batch
    np.testing.assert_allclose(losses(small, parts), plain, rtol=2e-4)


def test_bfloat16_stays_near(small, plain):
    low = losses(small, [*WITHOUT, "bfloat16"])
    assert not np.array_equal(low, plain)
    np.testing.assert_allclose(low, plain, rtol=0.02)


def test_each_improvement_is_taken_out(small, monkeypatch):
    """Not merely renamed: what stands in its place runs, and nothing of it when it is in."""
    ran = []
    stand_in = steps._plain_losses
    monkeypatch.setattr(steps, "_plain_losses", lambda *a: ran.append("loss") or stand_in(*a))
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: ran.append("dropout") or x)
    Steps(small, []).take(*small.batches[0])
    assert {"loss", "dropout"} <= set(ran)
    ran.clear()
    Steps(small, list(WITHOUT)).take(*small.batches[0])
    assert not ran


def test_tf32_is_of_the_step_alone(small, monkeypatch):
    for parts, setting in (([*WITHOUT, "tf32"], "high"), ([*WITHOUT], "highest"), (["bfloat16"], "highest")):
        seen, one = [], Steps(small, parts)
        loss, one.device = one.loss, "cuda"  # for its precision alone: on a CPU there is nothing to set
        monkeypatch.setattr(steps, "autocast", lambda *_, **__: contextlib.nullcontext())

        def watched(*arguments, loss=loss, seen=seen):
            seen.append(torch.get_float32_matmul_precision())
            return loss(*arguments)

        one.loss = watched
        one.take_number(0)
        assert seen == [setting]
        assert torch.get_float32_matmul_precision() == "highest"


def test_configurations_of_a_gpu():
    names = list(configurations(True, "cuda"))
    for name in ("plain PyTorch", "plain, torch.compile", "all", "all, bfloat16", "all, CUDA graphs"):
        assert name in names
    for way in ("plain", "plain, torch.compile", "all", "all, torch.compile", "all, CUDA graphs"):
        assert {f"{way}, tf32", f"{way}, bfloat16"} <= set(names)
    # What tells most is made ready first, for time may end.
    assert names[:2] == ["plain PyTorch", "all, CUDA graphs, tf32"]
    assert configurations(True, "cuda")["all, torch.compile, tf32"] == [
        *WITHOUT,
        "torch.compile",
        "tf32",
    ]
    assert "+ quick dropout masks" not in names, "they are a CPU's"
    assert not any("CUDA" in name for name in configurations(True))
