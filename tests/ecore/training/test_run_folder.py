"""A run's folder: one process trains there, and no bit of its files changes unseen."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ecore import pretrained
from ecore.config import TrainingConfig
from ecore.errors import InputError
from ecore.model import ECore
from ecore.training import checkpoint, run_folder
from ecore.training.checkpoint import Progress
from ecore.training.interrupt import Interrupt
from ecore.training.schedule import adam


def model_of(data, tiny):
    torch.manual_seed(0)
    model = ECore(tiny, data.vocabulary, data.tables, data.embeddings)
    return model, adam(model.parameters())


@pytest.fixture(scope="module")
def made(data, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, optimizer = model_of(data, tiny)
    model.loss(data.train.batch([0, 1])).total.backward()
    optimizer.step()
    run_folder.start(folder, data, run_folder.Settings(tiny, TrainingConfig(), run_folder.describe(data)))
    random_states = [checkpoint.random_state(torch.device("cpu"))]
    checkpoint.save(folder, model, optimizer, Progress(step=1, best=0.5), random_states)
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def resumed(run, data, tiny):
    model, optimizer = model_of(data, tiny)
    settings = run_folder.resume(run, data, None)
    progress = checkpoint.load(run, model, optimizer)
    tensors = [*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())]
    return settings, progress, [t.clone() for t in tensors], torch.get_rng_state()


def same(one, other):
    return one[:2] == other[:2] and all(
        torch.equal(a, b) for a, b in zip([*one[2], one[3]], [*other[2], other[3]], strict=True)
    )


def test_every_flipped_bit_is_seen_or_changes_nothing(run, data, tiny):
    picks, whole = random.Random(0), resumed(run, data, tiny)
    refused = 0
    for path in sorted(run.iterdir()):
        content, bits = path.read_bytes(), 8 * path.stat().st_size
        # The header of safetensors, too: it is short beside the tensors.
        places = {0, 3, 8 * 70 + 1, bits // 2, bits - 1} | {picks.randrange(bits) for _ in range(8)}
        for bit in places | {picks.randrange(min(bits, 8 * 2000)) for _ in range(8)}:
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                found, complaint = resumed(run, data, tiny), ""
            except InputError as error:
                refused, complaint = refused + 1, str(error)
            if complaint:
                assert re.fullmatch(rf".*{path.name}.*", complaint)
            else:
                assert same(found, whole), f"{path.name}: bit {bit} changed what is loaded"
            path.write_bytes(content)
    assert refused > 60


def test_files_without_checksums_load(run, data, tiny):
    whole = resumed(run, data, tiny)
    for path in run.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            notes, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        del notes["sha256"]
        save_file(tensors, path, metadata=notes)
    for name in ("config.json", "checkpoints.json"):
        value = json.loads((run / name).read_text())
        del value["checksum"]
        (run / name).write_text(json.dumps(value, indent=1) + "\n")
    assert same(resumed(run, data, tiny), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run, data, tiny, value):
    model, _ = model_of(data, tiny)
    with torch.no_grad():
        model.embedding.word.weight[7, 3] = value
    pretrained.save(model, run.parent / "model")
    with pytest.raises(InputError, match=r"embedding\.word\.weight: a weight is not finite"):
        pretrained.load(run.parent / "model")


@pytest.mark.parametrize("name", ["../other/checkpoint-000001", "/etc/passwd", "..", "", "a\0b", 3])
def test_pointers_stay_in_the_run(run, name):
    (run / "checkpoints.json").write_text(json.dumps({"best": name, "last": name}))
    with pytest.raises(InputError, match=r"checkpoints\.json: "):
        pretrained.weights_file(run, "best")


def test_one_process_trains_in_a_run(tmp_path):
    run = tmp_path / "run"
    script = f"""
import sys
from pathlib import Path
from ecore.training.run_folder import alone
with alone(Path({str(run)!r})):
    print("in", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="another process trains there"), run_folder.alone(run):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with run_folder.alone(run):  # whoever dies leaves no lock
        (run / "kept").touch()
    assert (run / "kept").exists()
    with run_folder.alone(tmp_path / "nothing came of it"):
        pass
    assert not (tmp_path / "nothing came of it").exists()


def test_leftovers_of_safetensors_are_strays(run, data, tiny):
    (run / ".tmpaB3dE6").write_bytes(b"half")
    assert [path.name for path in checkpoint.stray_files(run)] == [".tmpaB3dE6"]
    resumed(run, data, tiny)
    assert not (run / ".tmpaB3dE6").exists()


def test_a_closed_terminal_asks_for_a_checkpoint_unless_nohup_ignores_it():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
    assert interrupt.requested
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)
