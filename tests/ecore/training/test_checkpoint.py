"""Checkpoints: everything comes back, only what counts stays, and damage gets one line."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ecore.errors import InputError
from ecore.files import read_json
from ecore.model import ECore
from ecore.training import checkpoint
from ecore.training.checkpoint import Progress
from ecore.training.schedule import adam


def random():
    """Return the random state of one process on a CPU."""
    return [checkpoint.random_state(torch.device("cpu"))]


def trained(data, config, steps=2):
    model = ECore(config, data.vocabulary, data.tables, data.embeddings)
    optimizer = adam(model.parameters())
    optimizer.param_groups[0]["lr"] = 0.01
    for step in range(steps):
        model.loss(data.train.batch([step, step + 1])).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def saved(data, tiny, tmp_path):
    torch.manual_seed(0)
    model, optimizer = trained(data, tiny)
    checkpoint.save(tmp_path, model, optimizer, Progress(step=2), random())
    return model, optimizer


@pytest.mark.parametrize("tied", [False, True])
def test_everything_comes_back(data, tiny, tmp_path, tied):
    config = replace(tiny, tie_embeddings=tied)
    model, optimizer = trained(data, config)
    progress = Progress(step=2, epoch=1, batches=3, best=0.1 + 0.2, window={"total": 1 / 3}, line={"step": 2})
    torch.manual_seed(5)
    checkpoint.save(tmp_path, model, optimizer, progress, random())
    drawn = torch.rand(3)

    other, fresh = trained(data, config, steps=0)
    assert checkpoint.load(tmp_path, other, fresh) == progress
    assert torch.equal(torch.rand(3), drawn)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for part in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[a][part], fresh.state[b][part])
    assert (other.output.weight is other.embedding.word.weight) == tied


def test_parameters_that_never_had_a_gradient(data, tiny, tmp_path):
    model, optimizer = trained(data, replace(tiny, ablations=("gate-g",)))
    without = [p for p in model.parameters() if p not in optimizer.state]
    assert without, "this ablation should leave a parameter unused"
    checkpoint.save(tmp_path, model, optimizer, Progress(step=2), random())
    other, fresh = trained(data, replace(tiny, ablations=("gate-g",)), steps=0)
    checkpoint.load(tmp_path, other, fresh)
    assert len(fresh.state) == len(optimizer.state)


def test_keeps_the_best_and_the_last_alone(data, tiny, tmp_path):
    model, optimizer = trained(data, tiny)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2)):
        checkpoint.save(tmp_path, model, optimizer, Progress(step=step, best_step=best), random())
    assert read_json(tmp_path / "checkpoints.json") == {
        "best": "checkpoint-000002",
        "last": "checkpoint-000004",
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-000002.safetensors",
        "checkpoint-000004.safetensors",
        "checkpoint-000004.state.safetensors",
        "checkpoints.json",
    }


def test_without_validation_the_last_counts_as_the_best(saved, tmp_path):
    assert read_json(tmp_path / "checkpoints.json")["best"] == "checkpoint-000002"


def test_leftovers_are_removed(data, tiny, saved, tmp_path):
    for name in (".checkpoint-000003.safetensors.99.tmp", "checkpoint-000003.safetensors"):
        (tmp_path / name).write_bytes(b"torn")
    checkpoint.load(tmp_path, *trained(data, tiny, steps=0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-000002.safetensors",
        "checkpoint-000002.state.safetensors",
        "checkpoints.json",
    ]


def test_nothing_there(data, tiny, tmp_path):
    assert checkpoint.load(tmp_path, *trained(data, tiny, steps=0)) is None


@pytest.mark.parametrize("name", ["checkpoint-000002.safetensors", "checkpoint-000002.state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "torn", "rubbish"])
def test_damage_is_reported(data, tiny, saved, tmp_path, name, damage):
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "torn" else b"rubbish")
    with pytest.raises(InputError, match=name):
        checkpoint.load(tmp_path, *trained(data, tiny, steps=0))


def test_checkpoint_of_another_model(data, tiny, saved, tmp_path):
    with pytest.raises(InputError, match="does not fit"):
        checkpoint.load(tmp_path, *trained(data, replace(tiny, dim=24), steps=0))


def test_missing_best(data, tiny, tmp_path):
    model, optimizer = trained(data, tiny)
    for step in (1, 2):
        checkpoint.save(tmp_path, model, optimizer, Progress(step=step, best_step=1), random())
    (tmp_path / "checkpoint-000001.safetensors").unlink()
    with pytest.raises(InputError, match="checkpoint-000001"):
        checkpoint.load(tmp_path, *trained(data, tiny, steps=0))


def test_files_are_as_readable_as_others(saved, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {plain.stat().st_mode}


def test_the_state_of_an_older_run_comes_back(data, tiny, tmp_path, saved):
    """Before the perceiver was a part of its own, names of the graph's weights began otherwise."""
    older = {"perceiver.graph_network.": "graph.", "perceiver.correlation.": "correlation."}
    older["perceiver.perceptron."] = "perceptron."
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            notes, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        renamed = {}
        for name, value in tensors.items():
            for new, old in older.items():
                name = name.replace(new, old)
            renamed[name] = value
        assert renamed.keys() != tensors.keys()
        save_file(renamed, path, metadata=notes)
    model, optimizer = saved
    other, fresh = trained(data, tiny, steps=0)
    assert checkpoint.load(tmp_path, other, fresh) == Progress(step=2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["exp_avg"], fresh.state[b]["exp_avg"])
