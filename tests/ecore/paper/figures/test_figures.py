"""All figures of a run: the log's curves, what cannot be drawn, and files that do not change."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="figures need the extra `figures`")

from ecore.cli.figures import declare_figures, run_figures  # noqa: E402
from ecore.data.prepared import PreparedData  # noqa: E402
from ecore.errors import InputError  # noqa: E402
from ecore.model import ECore  # noqa: E402
from ecore.paper.figures import (  # noqa: E402
    NotDrawn,
    cooccurrence,
    draw_run,
    draw_training,
    learned_correlation,
    mentions,
    trace,
    training_curves,
)
from tests.ecore.paper.figures.runs import FEW, TURNS, new_model, save_run  # noqa: E402

# Training ---------------------------------------------------------------------------------------------------------


def test_training_curves_are_the_logs(run: Path, tmp_path: Path) -> None:
    curves = training_curves(run)
    assert curves.loss == [(1, 89.0), (9, 81.0)]  # null left out, the torn line too
    assert curves.train_ppl == [(s, pytest.approx(np.exp(5 - s / 10))) for s in (1, 5, 9)]
    assert curves.valid_ppl == [(9, 60.0)]
    assert curves.valid_ppl_per_sample == [(9, 50.0)]
    assert curves.train_accuracy == [(1, 3.0), (5, 15.0), (9, 27.0)]
    assert curves.valid_accuracy == [(9, 30.0)]
    loss, ppl, accuracy = draw_training(curves, "run").axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), curves.loss)
    assert ppl.get_yscale() == "log"
    for axes, expected in (
        (ppl, (curves.train_ppl, curves.valid_ppl, curves.valid_ppl_per_sample)),
        (accuracy, (curves.train_accuracy, curves.valid_accuracy)),
    ):
        for line, points in zip(axes.lines, expected, strict=True):
            np.testing.assert_allclose(line.get_xydata(), points)
    assert [text.get_text() for text in ppl.get_legend().get_texts()][1:] == [
        "validation, per token: 60.0",
        "validation, per sample: 50.0",
    ]
    with pytest.raises(NotDrawn, match="nothing logged"):
        training_curves(tmp_path)


# All of a run -----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    declare_figures(parser)
    return run_figures(parser.parse_args([str(a) for a in arguments]))


def test_every_figure_of_a_run_the_same_bytes_every_time(
    run: Path, prepared: Path, model: ECore, tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams)
    written = draw_run(run, tmp_path / "a", progress=False)
    with matplotlib.rc_context(
        {"font.size": 31, "pdf.compression": 0, "axes.grid": True}
    ):  # a user's matplotlibrc
        draw_run(run, tmp_path / "b", progress=False)
    assert dict(matplotlib.rcParams) == before
    names = {
        f"{name}.{kind}"
        for name in ("training", "figure2", "figure4", "figure5", "figure6")
        for kind in ("pdf", "png", "json")
    }
    assert {path.name for path in written} == names == {path.name for path in (tmp_path / "b").iterdir()}
    for path in written:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert b"CreationDate" not in (tmp_path / "a" / "figure5.pdf").read_bytes()

    drawn = {path.stem: json.loads(path.read_text()) for path in written if path.suffix == ".json"}
    talk = PreparedData.load(prepared).test.texts(0)
    seen = trace(model, talk["context"], talk["emotion"])
    assert drawn["figure5"]["words"] == list(seen.words)
    np.testing.assert_allclose(drawn["figure5"]["word_edges"], seen.word_edges)
    assert drawn["figure6"]["emotion"] == talk["emotion"]
    assert drawn["figure4"]["dialogues"] == 3 * len(FEW) == drawn["figure2"]["dialogues"]
    found = [
        m.found | {m.emotion} for m in mentions(PreparedData.load(prepared).conversations(), progress=False)
    ]
    counted = cooccurrence(found, model.vocabulary.emotions)
    assert drawn["figure4"]["data"]["weights"] == counted.tolist()
    assert counted.max() >= 3
    assert drawn["training"]["loss"] == [[1, 89.0], [9, 81.0]]


def test_only_what_was_asked_for_and_a_dialogue_of_ones_own(
    run: Path, prepared: Path, tmp_path: Path
) -> None:
    assert command(run, "--out", tmp_path, "--only", "5", "--text", "I am afraid.", "--text", "Why?") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"figure5.pdf", "figure5.png", "figure5.json"}
    figure5 = json.loads((tmp_path / "figure5.json").read_text())
    assert figure5["words"] == ["[CLS]", "i", "am", "afraid", ".", "why", "?"]
    assert figure5["emotion"] is None
    assert command(run, "--out", tmp_path, "--only", "6", "--split", "valid", "--sample", "5") == 0
    record = json.loads((tmp_path / "figure6.json").read_text())
    assert record["emotion"] == PreparedData.load(prepared).valid.texts(5)["emotion"]


def test_without_its_data_the_rest_is_drawn(model: ECore, tmp_path: Path, capsys) -> None:
    run = save_run(model, tmp_path / "run", tmp_path / "gone")
    draw_run(run, tmp_path / "out", progress=False)
    out = capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"training", "figure4"}
    assert "figure 2: not drawn" in out
    assert "figures 5 and 6: not drawn" in out
    assert "only the model's half" in out
    config = json.loads((run / "config.json").read_text())
    del config["data"]["folder"]  # as in a model that was exported
    (run / "config.json").write_text(json.dumps(config))
    draw_run(run, tmp_path / "out", progress=False)
    assert "config.json: names no data folder" in capsys.readouterr().out
    draw_run(run, tmp_path / "own", text=["I am sad."], progress=False)
    assert {path.stem for path in (tmp_path / "own").iterdir()} == {
        "training",
        "figure4",
        "figure5",
        "figure6",
    }


def test_a_run_without_graph_has_its_other_figures(prepared: Path, tmp_path: Path, capsys) -> None:
    run = save_run(new_model(prepared, ablations=("graph",)), tmp_path / "run", prepared)
    draw_run(run, tmp_path / "out", progress=False)
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"training", "figure2", "figure4"}
    assert "no emotion graph (--ablate graph or" in capsys.readouterr().out


def test_refusals(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, complaint in (
        (("--sample", 99), "sample: expected 0 to 15 of the test split, got 99"),
        (("--sample", -1), "got -1"),
        (("--text", "Hi.", "--sample", 0), "either --text or --sample"),
        (("--text", " "), "dialogue: expected"),
        (("--data", tmp_path / "none"), "no such folder"),
    ):
        with pytest.raises(InputError, match=complaint):
            command(run, "--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="expected one that `ecore train` wrote"):
        command(tmp_path / "none", "--out", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        command(run, "--out", tmp_path / "file", "--only", "training")
    with pytest.raises(InputError, match="figure: expected one of"):
        draw_run(run, tmp_path / "out", only=["3"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'ecore\[figures\]'"):
        command(run, "--out", tmp_path / "out")


def test_pyplot_is_never_imported(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from ecore.paper.figures import draw_run; "
        f"draw_run({str(run)!r}, {str(tmp_path)!r}, only=['training', '5', '6'], text=['I am sad.']); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_emotions_without_a_graph_have_no_graph_to_draw(prepared: Path) -> None:
    headed = new_model(prepared, strategy="none", emotions=True)
    with pytest.raises(NotDrawn, match="no emotion graph"):
        trace(headed, TURNS)
    with pytest.raises(NotDrawn, match="no emotion correlation"):
        learned_correlation(headed)


def test_a_plain_transformer_has_what_needs_no_emotions(prepared: Path, tmp_path: Path, capsys) -> None:
    run = save_run(new_model(prepared, strategy="none"), tmp_path / "run", prepared)
    draw_run(run, tmp_path / "out", progress=False)
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"training", "figure2"}
    assert "learned no emotion correlation" in capsys.readouterr().out
