"""The comparison of E-CORE's step with its rivals'."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import baselines
from ecore.baselines import BASELINES
from ecore.data.prepare import prepare
from tests.ecore.training.conftest import write_corpus


@pytest.fixture
def folder(tmp_path):
    prepare(write_corpus(tmp_path / "corpus"), tmp_path / "prepared", progress=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "prepared"
    torch.set_num_threads(threads)


def test_all_are_measured_but_who_lacks_its_input(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    baselines.main(
        ["--data", str(folder), "--preset", "tiny", "--rounds", "2", "--out", str(out)],
    )
    rows = {row["system"]: row for row in json.loads(out.read_text())["results"][0]["systems"]}
    assert set(rows) == {"ecore", *BASELINES}
    assert "relations" in rows.pop("kemp")["refused"]
    assert rows["ecore"]["of_ecore"] == 1.0
    assert all(row["median_seconds"] > 0 for row in rows.values())
    shown = capsys.readouterr().out
    assert "- kemp: model: kemp needs related words" in shown
