"""A few cases of every campaign, and what counts as a fault."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.campaigns import fuzz, mutations
from tests.campaigns.forge import ROOT, Result, environment, fault


def test_a_few_cases_of_every_campaign():
    command = [sys.executable, "-m", "tests.campaigns", "all", "--cases", "5", "--seed", "1"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for name in ("kill", "flip", "inputs", "disk"):
        assert f"{name}: seed 1, 5 cases" in result.stdout
    assert "FAULT" not in result.stdout


LINE = "ecore: error: a.jsonl:3: not valid JSON\n"


@pytest.mark.parametrize(
    "result, wrong",
    [
        (Result(0, "done\n", ""), ""),
        (Result(2, "", LINE), ""),
        (Result(2, "", "usage: ecore train\necore train: error: --seed: expected\n"), ""),
        (Result(2, "", LINE + LINE), "2 lines that say why"),
        (Result(2, "", ""), "0 lines that say why"),
        (Result(1, "", LINE), "exit code 1"),
        (Result(-9, "", ""), "exit code -9"),
        (Result(0, "", "Traceback (most recent call last):\n  x\nKeyError: 1\n"), "traceback: KeyError: 1"),
        (Result(2, "", "ecore: error: got \x1b[2J\n"), "control characters"),
        (Result(-9, "", "", hung=True), "hangs"),
    ],
)
def test_what_is_a_fault(result, wrong):
    assert (wrong in fault(result)) if wrong else fault(result) == ""


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_fuzz_targets_hold_on_spoilt_seeds(name, tmp_path):
    check, file, seeds = fuzz.TARGETS[name]
    picks = random.Random(name)
    for seed in seeds():
        contents = [seed, *(mutations.bytes_of(seed, picks) for _ in range(60))]
        if name in ("corpus-jsonl", "json"):
            contents += [mutations.json_of(seed, picks, lines=name != "json") for _ in range(60)]
        for content in contents:
            (tmp_path / file).write_bytes(content)
            check(tmp_path / file)
