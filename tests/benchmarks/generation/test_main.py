"""The command: what it measures, writes, prints, draws and refuses."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import harness
from benchmarks.generation.__main__ import main
from benchmarks.generation.report import drawn


def test_run(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main(["--preset", "tiny", "--rounds", "2", "--threads", "1", "--out", str(tmp_path / "r.json")])
    assert torch.get_num_threads() == threads
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["batch"] for row in result["compared"]] == [1, 3]
    assert result["growth"]["beams"].keys() == {"1", "2"}
    printed = capsys.readouterr().out
    per_word = result["compared"][0]["timings"]["all (what ecore does)"]["median"] / 4
    assert harness.duration(per_word) in printed
    assert "where a word's time goes" in printed


def test_plot_of_what_was_kept(tmp_path) -> None:
    growth = {
        "batch": {"1": 0.01, "4": 0.004},
        "context words": {"32": 0.02},
        "words already said": {"9": 0.03},
    }
    kept = tmp_path / "kept.json"
    results = [{"preset": preset, "growth": growth} for preset in ("one", "two")]
    kept.write_text(json.dumps({"benchmark": "generation", "results": results}))
    images = []
    for name in ("a.svg", "b.svg"):
        main(["--from", str(kept), "--plot", str(tmp_path / name)])
        images.append((tmp_path / name).read_text())
    assert images[0] == images[1]
    assert "two, context words" in images[0]
    with pytest.raises(SystemExit):
        main(["--from", str(kept)])

    throughput, cost = drawn(results).axes
    assert [line.get_xydata().tolist() for line in throughput.lines] == [[[1, 100], [4, 250]]] * 2
    assert [line.get_xydata().tolist() for line in cost.lines] == [[[32, 20]], [[9, 30]]] * 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "no such file"),
        ("{", "Expecting"),
        ('{"benchmark": "training", "results": []}', "expected results"),
        (json.dumps({"benchmark": "generation", "results": [{}] * 4}), "at most 3 results, got 4"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, capsys: pytest.CaptureFixture[str], text, complaint) -> None:
    kept, image = tmp_path / "kept.json", tmp_path / "image.svg"
    if text is not None:
        kept.write_text(text)
    with pytest.raises(SystemExit):
        main(["--from", str(kept), "--plot", str(image)])
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert not image.exists()
