"""A process that is killed, anywhere around a checkpoint, loses nothing but the steps since the last one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One process imports torch and forks a child for each place to die at: starting each anew would take minutes.
SCRIPT = '''
import json, os, signal, sys
from pathlib import Path

import safetensors.torch
import torch

torch.set_num_threads(1)
from ecore.config import ModelConfig, TrainingConfig
from ecore.data.prepared import PreparedData
from ecore.model import weights
from ecore.training.journal import read_metrics
from ecore.training.trainer import train

folder, prepared = Path(sys.argv[1]), sys.argv[2]
data = PreparedData.load(prepared)
tiny = ModelConfig(dim=12, encoder_blocks=1, decoder_blocks=1, feed_forward=16)
settings = TrainingConfig(
    batch_size=10, max_steps=4, warmup=4, log_every=1, validate_every=3, checkpoint_every=2
)


def die_at(place):
    """Kill this process at the place-th operation on files that training does; 0 only counts them."""
    count = 0

    def passing():
        nonlocal count
        count += 1
        if count == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def spied(function):
        def call(*arguments, **options):
            passing()
            return function(*arguments, **options)
        return call

    def torn(tensors, path, *arguments, **options):
        whole = safetensors.torch.save(tensors, *arguments, **options)
        Path(path).write_bytes(whole[: len(whole) // 2])
        passing()
        Path(path).write_bytes(whole)

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir")):
        setattr(owner, name, spied(getattr(owner, name)))
    weights.save_file = torn
    return lambda: count


def losses(run):
    return [{k: line[k] for k in ("step", "loss", "emotion", "lr")} for line in read_metrics(run)]


def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(run, place):
    counted = die_at(place)
    train(run, data, tiny, settings, progress=False)
    (folder / "count").write_text(str(counted()))


train(folder / "warm-up", data, tiny, settings, progress=False)  # torch imports much at its first step
report = {"count": 0, "wrong": [], "unresumable": []}
assert child(lambda: killed(folder / "reference", 0)) == 0
report["count"] = int((folder / "count").read_text())
expected = losses(folder / "reference")
files = sorted(p.name for p in (folder / "reference").iterdir() if not p.name.startswith("events"))
for place in range(1, report["count"] + 1):
    run = folder / f"run{place}"
    assert child(lambda: killed(run, place)) == -signal.SIGKILL, place
    started = (run / "config.json").exists()

    def resume():
        new = () if started else (tiny, settings)
        train(run, data, *new, resume=started, progress=False)

    if child(resume) != 0:
        report["unresumable"].append(place)
    elif losses(run) != expected:
        report["wrong"].append(place)
    elif sorted(p.name for p in run.iterdir() if not p.name.startswith("events")) != files:
        report["wrong"].append(f"{place}: files")
print(json.dumps(report))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_anywhere(prepared_folder, tmp_path):
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    )
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(prepared_folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["count"] >= 30, "the places to die at are no longer reached"
    assert report["unresumable"] == [], result.stderr
    assert report["wrong"] == []
