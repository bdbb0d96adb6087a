"""A run that several processes train or one alone: its command, their environment, and what has to be the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ecore.pretrained import weights_file
from ecore.training.journal import read_metrics
from tests.sizes import TINY_MODEL

ROOT = Path(__file__).parents[3]
# Batches of 5 of 48 samples: shares of 3 and 2, and a last batch of 3.
FLAGS = [
    *TINY_MODEL,
    *("--dropout", "0", "--graph-dropout", "0", "--batch-size", "5", "--max-steps", "12"),
    *("--validate-every", "6", "--log-every", "1", "--warmup", "5", "--threads", "1", "--literal-thresholds"),
]


def train(prepared: Path, run: Path, *flags: str) -> list[str]:
    """A command that starts a run."""
    return ["train", "--data", str(prepared), "--out", str(run), *FLAGS, *flags]


def resume(run: Path, steps: int, *flags: str) -> list[str]:
    """A command that goes on with a run."""
    return ["train", "--out", str(run), "--resume", "--max-steps", str(steps), *flags]


def in_turn(folder: Path, *commands: list[str]) -> Path:
    """A script for torchrun that runs commands one after the other: its processes take longer to start than to train.

    They join once, and part after the last: torchrun's store knows no second group.
    """
    script = folder / "commands.py"
    script.write_text(f"""
import functools, sys
from ecore.cli import main
from ecore.training import distributed

leave, distributed.leave = distributed.leave, lambda: None
distributed.join = functools.cache(distributed.join)
for command in {commands!r}:
    if code := main(command):
        sys.exit(code)
leave()
""")
    return script


def python_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


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
