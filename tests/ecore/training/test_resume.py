"""Training stops anywhere and goes on as if it had not; what it refuses to resume."""

import os
import signal
import time
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.errors import InputError
from ecore.files import read_json
from ecore.training.interrupt import Interrupt
from tests.ecore.training.runs import at_call, interrupt, same, weights


@pytest.mark.parametrize(
    "method, call",
    [("loss", 1), ("loss", 4), ("loss", 5), ("loss", 8), ("loss", 13), ("score", 1), ("score", 5)],
)
def test_interrupted_and_resumed_is_as_never_stopped(
    quiet_train, reference, numbers, monkeypatch, tmp_path, method, call
):
    with monkeypatch.context() as patched:
        at_call(patched, method, call, interrupt)
        summary = quiet_train(tmp_path / "run")
    assert summary["interrupted"]
    # A validation has two batches: its first is call 1 at step 5 and call 5 at step 13.
    step = call if method == "loss" else {1: 5, 5: 13}[call]
    assert summary["step"] == step
    assert read_json(tmp_path / "run/checkpoints.json")["last"] == f"checkpoint-{step:06d}"

    summary = quiet_train(tmp_path / "run", resume=True)
    assert not summary["interrupted"]
    assert numbers(tmp_path / "run") == numbers(reference)
    assert same(weights(tmp_path / "run"), weights(reference))
    assert read_json(tmp_path / "run/checkpoints.json") == read_json(reference / "checkpoints.json")


def test_interrupted_again_and_again(quiet_train, settings, numbers, monkeypatch, tmp_path):
    settings = replace(settings, accumulate=2, batch_size=7)
    quiet_train(tmp_path / "reference", settings)
    quiet_train(tmp_path / "run", settings, max_steps=1)
    for _ in range(12):
        with monkeypatch.context() as patched:
            at_call(patched, "loss", 2, interrupt)
            quiet_train(tmp_path / "run", resume=True, max_steps=13)
    quiet_train(tmp_path / "run", resume=True)
    expected = numbers(tmp_path / "reference")
    # The first leg ended at step 1, so that step was validated too.
    first, *rest = numbers(tmp_path / "run")
    assert {k: v for k, v in first.items() if not k.startswith("valid")} == expected[0]
    assert rest == expected[1:]


def test_prolonged_run(quiet_train, reference, numbers, tmp_path):
    quiet_train(tmp_path / "run", max_steps=8)
    assert numbers(tmp_path / "run")[-1]["step"] == 8
    assert quiet_train(tmp_path / "run", resume=True, max_steps=13)["step"] == 13
    assert [line for line in numbers(tmp_path / "run") if line["step"] != 8] == numbers(reference)
    assert read_json(tmp_path / "run/config.json")["training"]["max_steps"] == 13
    with pytest.raises(InputError, match="already trained for 13 steps"):
        quiet_train(tmp_path / "run", resume=True, max_steps=5)


def test_resuming_a_finished_run_changes_nothing(quiet_train, reference, numbers):
    before = numbers(reference)
    assert quiet_train(reference, resume=True)["step"] == 13
    assert numbers(reference) == before


@pytest.mark.parametrize("method, call", [("loss", 7), ("score", 1)])
def test_lines_after_the_checkpoint_are_cut(
    quiet_train, reference, numbers, monkeypatch, tmp_path, method, call
):
    with monkeypatch.context() as patched:
        at_call(patched, method, call, interrupt)
        quiet_train(tmp_path / "run")
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        if method == "score":  # step 5 waits in the checkpoint for its validation
            file.write('{"step": 5, "loss": 1.0}\n')
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    quiet_train(tmp_path / "run", resume=True)
    assert numbers(tmp_path / "run") == numbers(reference)


def test_tensorboard(quiet_train, reference, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        at_call(patched, "loss", 7, interrupt)
        quiet_train(tmp_path / "run")
    # TensorBoard orders the files of one second and one process by their numbers as text, 10 before 9.
    time.sleep(1.0)
    with SummaryWriter(str(tmp_path / "run")) as writer:  # what a process wrote before it was killed
        writer.add_scalar("loss", 1.0, 9)
    time.sleep(1.0)
    quiet_train(tmp_path / "run", resume=True)
    for run in (reference, tmp_path / "run"):
        events = EventAccumulator(str(run)).Reload()
        assert [e.step for e in events.Scalars("loss")] == [1, 3, 5, 6, 9, 10, 12, 13]
        assert [e.step for e in events.Scalars("valid_ppl")] == [5, 10, 13]


@pytest.mark.parametrize("step", [1, 2, 4, 5, 7])
def test_an_interrupted_run_may_end_where_it_stands(quiet_train, numbers, monkeypatch, tmp_path, step):
    quiet_train(tmp_path / "reference", max_steps=step)
    with monkeypatch.context() as patched:
        at_call(patched, "loss", step, interrupt)
        assert quiet_train(tmp_path / "run")["step"] == step
    for _ in range(2):
        summary = quiet_train(tmp_path / "run", resume=True, max_steps=step)
        assert (summary["step"], summary["interrupted"]) == (step, False)
        assert summary["best_ppl_per_sample"] > 0
    expected, actual = numbers(tmp_path / "reference"), numbers(tmp_path / "run")
    # What only a step in progress can tell is missing.
    expected[-1] = {k: v for k, v in expected[-1].items() if k in actual[-1]}
    assert actual == expected
    assert same(weights(tmp_path / "run"), weights(tmp_path / "reference"))


@pytest.mark.parametrize("step", [6, 7])
def test_the_validation_of_a_run_that_ends_where_it_stands_may_be_interrupted(
    quiet_train, settings, numbers, monkeypatch, tmp_path, step
):
    settings = replace(settings, log_every=3)
    quiet_train(tmp_path / "reference", settings, max_steps=step)
    for name, call, options in (("loss", step, {}), ("score", 1, {"resume": True, "max_steps": step})):
        with monkeypatch.context() as patched:
            at_call(patched, name, call, interrupt)
            assert quiet_train(tmp_path / "run", settings, **options)["interrupted"]
    for _ in range(2):
        assert quiet_train(tmp_path / "run", resume=True, max_steps=step)["best_step"] is not None
    expected, actual = numbers(tmp_path / "reference"), numbers(tmp_path / "run")
    expected[-1] = {k: v for k, v in expected[-1].items() if k in actual[-1]}
    assert actual == expected


def test_nothing_to_resume(quiet_train, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        quiet_train(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_resume_keeps_its_settings(quiet_train, tiny, reference):
    with pytest.raises(InputError, match="keeps its own settings"):
        quiet_train(reference, resume=True, model_config=tiny)


@pytest.mark.parametrize(
    "options, what", [({"vocabulary": "train"}, "vocabulary"), ({"intensity": "none"}, "data")]
)
def test_resume_on_other_data(quiet_train, prepared_folder, reference, tmp_path, options, what):
    prepare(prepared_folder.parent / "corpus", tmp_path / "other", progress=False, **options)
    with pytest.raises(InputError, match=f"not the {what} that"):
        quiet_train(reference, resume=True, data=PreparedData.load(tmp_path / "other"))


def test_second_interruption_insists():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as asked:
        interrupt(None)
        assert asked.requested
        with pytest.raises(KeyboardInterrupt):
            interrupt(None)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_asks_too():
    with Interrupt() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.requested
