"""The examples, as their readers run them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ecore import ECore
from ecore.cli import main
from tests.ecore.training.conftest import write_corpus
from tests.sizes import TINY_MODEL

EXAMPLES = Path(__file__).parents[2] / "examples"
TURNS = ("My old dog died.", "I am so sorry!", "I cried all day.")


def example(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    corpus, prepared = str(write_corpus(folder / "corpus")), str(folder / "prepared")
    assert main(["prepare", "--data", corpus, "--out", prepared]) == 0
    steps = ["--batch-size", "10", "--warmup", "30", "--literal-thresholds", "--max-steps", "60"]
    assert main(["train", "--data", prepared, "--out", str(folder / "run"), *TINY_MODEL, *steps]) == 0
    return folder / "run"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_perception_runs_without_the_package_and_sees_what_the_model_sees(run, tmp_path, capsys):
    program = tmp_path / "perception.pt2"
    example("export_perception").main([str(run), str(program)])
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5  # each 1e-6 from float64
    loaded = torch.export.load(program)
    assert all(
        str(node.target).startswith(("aten", "<built-in"))
        for node in loaded.graph.nodes
        if node.op == "call_function"
    )
    command = [sys.executable, "-I", EXAMPLES / "perceive_exported.py", program, *TURNS]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = ECore.from_pretrained(run).perceive([TURNS])[0].emotions
    assert [line.split() for line in seen] == [[name, f"{value:.3f}"] for name, value in expected[:5]]


def test_an_exported_perception_needs_emotions(run, tmp_path, capsys):
    prepared = run.parent / "prepared"
    none = (
        f"train --data {prepared} --out {tmp_path}/none --preset tiny --dim 12 --strategy none --max-steps 1"
    )
    assert main(none.split()) == 0
    with pytest.raises(SystemExit):
        example("export_perception").main([f"{tmp_path}/none", f"{tmp_path}/x.pt2"])
    assert "expected a model with an emotion graph" in capsys.readouterr().err


def test_emotions_are_features_of_a_pipeline(run, capsys):
    base = pytest.importorskip("sklearn.base", reason="needs scikit-learn")
    module = example("emotion_features")
    features = base.clone(module.EmotionFeatures(str(run))).fit([])
    (row,) = features.transform([TURNS[0]])
    emotions = dict(ECore.from_pretrained(run).perceive(TURNS[0]).emotions)
    assert row.tolist() == pytest.approx(
        [torch.tensor(emotions[n]).log().item() for n in features.get_feature_names_out()], rel=1e-4
    )
    module.main([str(run)])
    assert "accuracy" in capsys.readouterr().out


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    plots = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    monkeypatch.setattr(plots, "show", lambda: None)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    cells[0] = cells[0].replace('"ecore-demo"', '"ecore-demo", "--steps", "4"')
    names = {}
    for cell in cells:
        exec(cell, names)
    assert len(plots.get_fignums()) == 2
    plots.close("all")
    written = capsys.readouterr().out
    assert "graph_attention: " in written
    assert float(written.split()[-1]) < 1e-4
    assert not any(cell.get("outputs") for cell in notebook["cells"])
