"""The log in an experiment tracker: the same numbers, one run over resumptions, never at training's expense."""

import sys
import types

import pytest

from ecore.errors import InputError
from ecore.training.journal import read_metrics
from ecore.training.trainer import train


class Stub(types.ModuleType):
    """A tracker's package, which writes down what it is asked; ``broken`` from that step on."""

    def __init__(self, name, broken=None, locked=False):
        super().__init__(name)
        self.runs, self.sent, self.finished, self.broken, self.locked = [], [], 0, broken, locked

    def init(self, **options):
        if self.locked:
            raise ValueError("no login\nrun: login")
        self.runs.append(options)

    def log(self, values, step):
        if self.broken is not None and step >= self.broken:
            raise OSError("the network is down")
        self.sent.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def package(monkeypatch):
    def install(name="wandb", **options):
        stub = Stub(name, **options)
        monkeypatch.setitem(sys.modules, name, stub)
        return stub

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_tracker_has_the_logs_numbers_and_a_resumed_run_its_curves(
    data, tiny, settings, tmp_path, package, name
):
    stub = package(name)
    run = tmp_path / "run"
    train(run, data, tiny, settings, max_steps=6, log_to=name)
    train(run, data, resume=True, max_steps=12, log_to=name)
    logged = [dict(line) for line in read_metrics(run)]
    assert stub.sent == [(line.pop("step"), line) for line in logged]
    first, second = stub.runs
    assert first == second | {"config": first["config"]}
    assert first["config"]["dim"] == tiny.dim
    assert first["config"]["max_steps"] == 6
    assert first["name"].startswith("run-")
    assert first["resume"] == "allow"
    assert ("id" in first) == (name == "wandb")
    assert stub.finished == 2


def test_two_runs_of_one_name_have_their_own_curves(data, tiny, settings, tmp_path, package):
    stub = package()
    for parent in ("a", "b"):
        train(tmp_path / parent / "run", data, tiny, settings, max_steps=1, log_to="wandb")
    assert stub.runs[0]["id"] != stub.runs[1]["id"]


def test_a_tracker_that_fails_costs_one_warning(data, tiny, settings, tmp_path, package, capsys):
    stub = package(broken=2)
    train(tmp_path / "run", data, tiny, settings, max_steps=6, log_to="wandb")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 3, 5, 6]
    assert [step for step, _ in stub.sent] == [1]
    warning = "ecore: warning: --log-to wandb: the network is down; training continues without it"
    assert capsys.readouterr().err.count(warning) == 1


def test_a_tracker_that_cannot_begin_leaves_no_folder(data, tiny, settings, tmp_path, package, monkeypatch):
    package(locked=True)
    with pytest.raises(InputError, match=r"^--log-to wandb: no login$"):
        train(tmp_path / "run", data, tiny, settings, log_to="wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"^--log-to wandb: .* \(pip install wandb\)$"):
        train(tmp_path / "run", data, tiny, settings, log_to="wandb")
    with pytest.raises(InputError, match=r"^--log-to: expected one of trackio, wandb, got 'x'$"):
        train(tmp_path / "run", data, tiny, settings, log_to="x")
    assert not (tmp_path / "run").exists()


def test_a_damaged_id_is_refused_by_name(data, tiny, settings, tmp_path, package):
    package()
    train(tmp_path / "run", data, tiny, settings, max_steps=1, log_to="wandb")
    (tmp_path / "run" / "tracker.json").write_text("[]")
    with pytest.raises(InputError, match=r'tracker\.json: expected an object with the text "id"'):
        train(tmp_path / "run", data, resume=True, max_steps=2, log_to="wandb")
