"""The commands of ``ecore reproduce --plan``: they make the runs that it would make itself."""

from __future__ import annotations

import shlex

import pytest

from ecore.cli import main
from ecore.data.prepared import PreparedData
from ecore.paper.experiments import runs
from ecore.paper.experiments.plan import Run, Variant
from ecore.training import trainer
from ecore.training.run_folder import read_settings
from tests.sizes import TINY_MODEL

SMALL = (
    *TINY_MODEL,
    *("--steps", "4", "--seeds", "2", "--limit", "8", "--warmup", "3", "--no-copy", "--graph-norm"),
    *("--threads", "1", "--device", "cpu"),
)


def planned(prepared, out, capsys, *what, flags=(), small=SMALL):
    """The commands that are printed: words of a training and of a scoring in turn."""
    assert (
        main(["reproduce", *what, "--data", str(prepared), "--out", str(out), "--plan", *small, *flags]) == 0
    )
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("ecore ")]
    assert [line[1] for line in lines] == ["train", "evaluate"] * (len(lines) // 2)
    return lines[::2], lines[1::2]


FLAGS = {
    "paper": (SMALL, ["--score-scale", "1", "--thresholds", "0", "0.15", "--dim", "24"]),
    "released": (
        [flag for flag in SMALL if flag != "--graph-norm"],
        ["--graph-form", "released", "--no-emotion-table", "--correlation-prior", "2"],
    ),
}


@pytest.mark.parametrize("form", FLAGS)
def test_flags_make_the_very_settings(prepared, tmp_path, capsys, monkeypatch, form):
    small, flags = FLAGS[form]
    made, wanted = {}, {}
    commands = runs.commands

    def noted(run, *rest):
        wanted[run.folder] = (run.model, run.training)
        return commands(run, *rest)

    monkeypatch.setattr("ecore.paper.experiments.reproduce.commands", noted)
    monkeypatch.setattr(
        trainer,
        "train",
        lambda out, data, model, training, **_: (
            made.update({out: (model, training)}) or dict.fromkeys(("step", "max_steps", "best_step"), 4)
        ),
    )
    trainings, _ = planned(
        prepared,
        tmp_path / "out",
        capsys,
        "table1",
        "table4",
        "table8",
        flags=[*flags, "--baselines"],
        small=small,
    )
    for line in trainings:
        with pytest.raises(KeyError):  # what it says in the end, it asks of a summary that is none
            main(line[1:])
    assert len(made) == len(trainings) > 20
    assert made == wanted
    assert {model.graph_form for model, _ in made.values() if model.model == "ecore"} == {form}
    rivals = [model.model for model, _ in made.values() if model.model != "ecore"]
    # Each at two sizes with two seeds; KEMP needs relations.
    assert sorted(rivals) == [name for name in ("empdg", "mime", "transformer") for _ in range(4)]


def test_a_run_made_by_hand_counts_as_done(prepared, tmp_path, capsys):
    out = tmp_path / "out"
    trainings, scorings = planned(prepared, out, capsys, "table1")
    assert not (out / "runs").exists()
    for line in (trainings[0], scorings[0]):
        assert main(line[1:]) == 0
    left, _ = planned(prepared, out, capsys, "table1")
    assert left == trainings[1:]
    folder = next(out.glob("runs/*"))
    kept = read_settings(folder)
    run = Run(Variant("none"), 0, folder, PreparedData.load(prepared).folder, kept.model, kept.training)
    assert runs.is_done(run)
