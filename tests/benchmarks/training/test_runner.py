"""Configurations timed in turn: what a row says, and that one that fails stops no other."""

from __future__ import annotations

from benchmarks.gpu.stand_in import Recordings
from benchmarks.training import runner
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
