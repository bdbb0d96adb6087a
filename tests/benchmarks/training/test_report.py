"""The plot of a step's cost."""

from __future__ import annotations

from benchmarks.training.report import plot


def test_ratios_are_drawn_where_plain_pytorch_was_measured(tmp_path):
    timing = {"median": 0.012, "p20": 0.011, "p80": 0.013}
    plain = {"configuration": "plain PyTorch", "timing": timing, "speedup_median": 1.0}
    rows = {"ratios": [plain, {**plain, "configuration": "all", "speedup_median": 1.31}]}
    rows["times"] = [{"configuration": "all", "timing": timing, "speedup_median": None}]
    images = {}
    for name, drawn in rows.items():
        plot(drawn, "released", tmp_path / f"{name}.svg")
        images[name] = (tmp_path / f"{name}.svg").read_text()
    assert "plain PyTorch's time of a training step / this" in images["ratios"]
    assert "1.31" in images["ratios"]
    assert "ms a training step" in images["times"]
    assert "12.0" in images["times"]
