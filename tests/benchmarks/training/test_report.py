"""The plot of a step's cost."""

from __future__ import annotations

from benchmarks.training.report import plot


def test_a_gpus_results_are_drawn_in_milliseconds(tmp_path):
    timing = {"median": 0.012, "p20": 0.011, "p80": 0.013}
    rows = [{"configuration": "all", "timing": timing, "u_median": 3.0}]
    images = []
    for device in ("cpu", "cuda"):
        plot(rows, "released", tmp_path / f"{device}.svg", device)
        images.append((tmp_path / f"{device}.svg").read_text())
    assert images[0] != images[1]
    assert "ms a training step" in images[1]
    assert "u a training step" in images[0]
