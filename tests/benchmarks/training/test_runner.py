"""Configurations timed in turn: what a row says, and that one that fails stops no other."""

from __future__ import annotations

import statistics
import sys
from functools import partial

from benchmarks.gpu.stand_in import Recordings
from benchmarks.training import breakdown, runner
from benchmarks.training.report import report
from benchmarks.training.steps import WITHOUT, Steps, configurations


def test_passes(small):
    """A GPU's configurations, here on the CPU and without a recording."""
    named = {name: configurations(False, "cuda")[name] for name in ("plain PyTorch", "all, CUDA graphs")}
    rows = runner.compare_passes(small, named, passes=3, device="cpu", recorder=Recordings())
    assert [row["configuration"] for row in rows] == list(named)
    for row in rows:
        assert row["timing"].measurements == 3
        assert 0.0 < row["mean_seconds"] * len(small.batches) < row["warm_up_seconds"] * 3
    assert rows[0]["speedup_median"] == 1.0


def test_a_configuration_that_fails_or_has_no_time_is_reported(small, monkeypatch):
    named = {"plain PyTorch": [], "broken": ["tf32"], "all": list(WITHOUT)}
    warm_up = Steps.warm_up

    def fail(self):
        if self.precision == "tf32":
            raise RuntimeError("out of memory\nand more")
        warm_up(self)

    monkeypatch.setattr(Steps, "warm_up", fail)
    rows = runner.compare_passes(small, named, passes=2, device="cpu")
    assert [row["configuration"] for row in rows] == ["plain PyTorch", "all", "broken"]
    assert rows[2] == {"configuration": "broken", "refused": "RuntimeError: out of memory"}
    assert rows[1]["timing"].measurements == 2
    del named["broken"]
    rows = runner.compare_passes(small, named, passes=9, device="cpu", budget=1e-6)
    assert [row.get("refused") for row in rows] == ["no time was left", "no time was left"]
    late = runner.compare_passes(small, {"all": []}, passes=2, device="cpu")
    assert late[0]["speedup_median"] is None
    document = {"preset": "paper", "device": "cuda", "data": "made up"}
    text = report(document | {"configurations": [*late, *rows]})
    assert "- plain PyTorch: no time was left" in text


SERVED = """
import sys, types
from benchmarks.training.runner import serve
taken = []
def take(number):
    taken.append(number)
    print("a line of somebody else's")
    if number == 2 and "ends" in sys.argv:
        raise SystemExit(7)
    return 10.0 + number + len(taken)
serve(types.SimpleNamespace(first_seconds=5.0, take=take), sys.stdin)
"""


def test_configurations_in_processes_of_their_own():
    """Each takes the same batches in turn; one that ends is reported, and the other goes on."""
    starts = {
        name: partial(runner.InOwnProcess, [sys.executable, "-c", SERVED, name])
        for name in ("plain PyTorch", "ends", "goes on")
    }
    starts["never begins"] = partial(runner.InOwnProcess, [sys.executable, "-c", "raise SystemExit(3)"])
    rows = {row["configuration"]: row for row in runner.compare(starts, rounds=4)}
    plain = rows["plain PyTorch"]
    fields = plain["first_two_steps_seconds"], plain["timing"].minimum, plain["timing"].measurements
    assert fields == (
        5.0,
        11.0,
        3 + 4,
    )  # beside the one that ended in its third step, and the one that did not
    goes_on = rows["goes on"]
    assert goes_on["mean_seconds"] == (11.0 + 13.0 + 15.0 + 17.0) / 4
    ratios = [(14.0 + 2 * n) / (11.0 + 2 * n) for n in range(4)]
    assert goes_on["speedup_median"] == statistics.median(ratios)
    assert goes_on["speedup_of_means"] == (14 + 16 + 18 + 20) / (11 + 13 + 15 + 17)
    assert rows["ends"] == {"configuration": "ends", "refused": "its process ended with exit code 7"}
    assert rows["never begins"]["refused"] == "its process ended with exit code 3"


def test_a_configurations_process_takes_real_steps():
    command = breakdown.command("baseline", None, "--steps-of", "all")
    rows = runner.compare({"plain PyTorch": partial(runner.InOwnProcess, command)}, rounds=2)
    assert 0.0 < rows[0]["timing"].minimum < 60.0
    assert rows[0]["speedup_median"] == 1.0
