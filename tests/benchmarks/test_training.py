"""The whole-step benchmark: what it switches on and off never changes the mathematics."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import training, training_report, whole_run, workload
from benchmarks.training import WITHOUT, Steps
from ecore.config import PRESETS
from ecore.data.batches import Widths
from ecore.data.prepare import prepare
from ecore.data.vocabulary import CLS, EOS, PAD
from ecore.demo import sample_corpus


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small():
    """Made-up batches of a small model and vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "WORDS", 300)
        patch.setattr(workload, "CONTEXT_WORDS", 12)
        patch.setattr(workload, "RESPONSE_WORDS", 6)
        patch.setitem(PRESETS, "released", PRESETS["tiny"])
        yield workload.workload(None, "released", batch_size=8, number=6)


class Again:
    """In a CUDA graph's place: the step once more."""

    def warm_up(self, work):
        return work()

    def record(self, work):
        return work


def losses(work, parts, steps=50):
    settings = {"dropout": 0.0, "graph_dropout": 0.0, "dim": 24, "feed_forward": 32}
    one = Steps(work, parts, recorder=Again(), **settings)
    return np.array([float(one.take_number(i)) for i in range(steps)])


@pytest.fixture(scope="module")
def plain(small):
    return losses(small, [])


@pytest.mark.parametrize(
    "parts",
    [[part] for part in WITHOUT] + [list(WITHOUT), [*WITHOUT, "CUDA graphs"]],
    ids=lambda p: ", ".join(p),
)
def test_fifty_steps_have_the_plain_losses(small, plain, parts):
    assert plain[48] < 0.98 * plain[0]  # the same batch
    np.testing.assert_allclose(losses(small, parts), plain, rtol=2e-4)


def test_bfloat16_stays_near(small, plain):
    low = losses(small, [*WITHOUT, "bfloat16"])
    assert not np.array_equal(low, plain)
    np.testing.assert_allclose(low, plain, rtol=0.02)


def test_each_improvement_is_taken_out(small, monkeypatch):
    """Not merely renamed: what stands in its place runs, and nothing of it when it is in."""
    ran = []
    stand_in = training._plain_losses
    monkeypatch.setattr(training, "_plain_losses", lambda *a: ran.append("loss") or stand_in(*a))
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: ran.append("dropout") or x)
    Steps(small, []).take(*small.batches[0])
    assert {"loss", "dropout"} <= set(ran)
    ran.clear()
    Steps(small, list(WITHOUT)).take(*small.batches[0])
    assert not ran


def test_made_up_batches_are_like_real_ones():
    batches = [workload.made_up_batch(16, seed) for seed in range(60)]
    contexts = np.concatenate([batch.lengths.numpy() - 1 for batch, _ in batches])
    answers = [int((batch.response != PAD).sum()) for batch, _ in batches]
    assert contexts.mean() == pytest.approx(workload.CONTEXT_WORDS, rel=0.15)
    assert np.mean(answers) / 16 == pytest.approx(workload.RESPONSE_WORDS, rel=0.15)
    for (batch, tokens), counted in zip(batches, answers, strict=True):
        assert tokens == counted
        assert (batch.context[:, 0] == CLS).all()
        assert ((batch.context != PAD).sum(1) == batch.lengths).all()
        assert ((batch.response == EOS).sum(1) == 1).all()
    assert workload.made_up_batch(2, 0, context=100)[0].context.shape == (2, 101)


def test_report(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "workload", lambda *_: small)
    monkeypatch.setattr(training, "peak_memory", lambda *_: 123.0)
    monkeypatch.setattr(training, "unit", lambda *_: 0.01)
    monkeypatch.setattr(
        training, "growth", lambda *_: [{"batch": 1, "context_words": None, "seconds_a_sample": 0.1}]
    )
    out, image = tmp_path / "training.json", tmp_path / "training.svg"
    training.main(["--rounds", "2", "--out", str(out), "--plot", str(image)])
    told = capsys.readouterr().out
    for name in training.configurations(False):
        assert name in told
    kept = json.loads(out.read_text())["results"][0]
    assert [row["configuration"] for row in kept["configurations"]] == list(training.configurations(False))
    assert all(row["u"] == pytest.approx(row["mean_seconds"] / 0.01) for row in kept["configurations"])
    assert kept["parts"]["all"]["graph operators"] > 0.0
    before = image.read_bytes()
    image.unlink()
    training.main(["--from", str(out), "--plot", str(image)])
    assert image.read_bytes() == before


def test_passes(small):
    """What a GPU's configurations go through, here on the CPU and without a recording."""
    named = {
        name: training.configurations(False, "cuda")[name] for name in ("plain PyTorch", "all, CUDA graphs")
    }
    u, rows = training.compare_passes(small, named, passes=3, device="cpu", recorder=Again())
    assert [row["configuration"] for row in rows] == list(named)
    for row in rows:
        assert row["timing"].measurements == 3
        assert row["u"] == pytest.approx(row["mean_seconds"] / u)
        assert 0.0 < row["mean_seconds"] * len(small.batches) < row["warm_up_seconds"] * 3
    assert rows[0]["speedup_median"] == 1.0


def test_a_configuration_that_fails_or_has_no_time_is_told(small, monkeypatch):
    named = {"plain PyTorch": [], "broken": ["tf32"], "all": list(WITHOUT)}
    warm_up = Steps.warm_up

    def fail(self):
        if self.precision == "tf32":
            raise RuntimeError("out of memory\nand more")
        warm_up(self)

    monkeypatch.setattr(Steps, "warm_up", fail)
    u, rows = training.compare_passes(small, named, passes=2, device="cpu")
    assert [row["configuration"] for row in rows] == ["plain PyTorch", "all", "broken"]
    assert rows[2] == {"configuration": "broken", "refused": "RuntimeError: out of memory"}
    assert rows[1]["timing"].measurements == 2
    del named["broken"]
    _, rows = training.compare_passes(small, named, passes=9, device="cpu", budget=1e-6)
    assert [row.get("refused") for row in rows] == ["no time was left", "no time was left"]
    _, late = training.compare_passes(small, {"all": []}, passes=2, device="cpu")
    assert late[0]["speedup_median"] is None
    document = {"preset": "paper", "device": "cuda", "data": "made up", "u_seconds": u}
    told = training_report.report(document | {"configurations": [*late, *rows]})
    assert "- plain PyTorch: no time was left" in told


def test_tf32_is_of_the_step_alone(small, monkeypatch):
    for parts, told in (([*WITHOUT, "tf32"], "high"), ([*WITHOUT], "highest"), (["bfloat16"], "highest")):
        seen, one = [], Steps(small, parts)
        loss, one.device = one.loss, "cuda"  # for its precision alone: on a CPU there is nothing to set
        monkeypatch.setattr(training, "autocast", lambda *_, **__: contextlib.nullcontext())

        def watched(*arguments, loss=loss, seen=seen):
            seen.append(torch.get_float32_matmul_precision())
            return loss(*arguments)

        one.loss = watched
        one.take_number(0)
        assert seen == [told]
        assert torch.get_float32_matmul_precision() == "highest"


def test_configurations_of_a_gpu():
    names = list(training.configurations(True, "cuda"))
    for name in ("plain PyTorch", "plain, torch.compile", "all", "all, bfloat16", "all, CUDA graphs"):
        assert name in names
    for way in ("plain", "plain, torch.compile", "all", "all, torch.compile", "all, CUDA graphs"):
        assert {f"{way}, tf32", f"{way}, bfloat16"} <= set(names)
    # What tells most is made ready first, for time may end.
    assert names[:2] == ["plain PyTorch", "all, CUDA graphs, tf32"]
    assert training.configurations(True, "cuda")["all, torch.compile, tf32"] == [
        *WITHOUT,
        "torch.compile",
        "tf32",
    ]
    assert "+ quick dropout masks" not in names, "they are a CPU's"
    assert not any("CUDA" in name for name in training.configurations(True))


def test_only_what_is_named_is_compiled(small, monkeypatch, capsys):
    monkeypatch.setattr(training, "workload", lambda *_: small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = []
    monkeypatch.setattr(
        training, "Steps", lambda _, parts, device: made.append(parts) or SimpleNamespace(warm_up=list)
    )
    flags = ["--device", "cuda", "--compile-only", "--only"]
    training.main([*flags, "all, torch.compile, tf32"])
    assert made == [[*WITHOUT, "torch.compile", "tf32"]]
    assert capsys.readouterr().out == "compiled: all, torch.compile, tf32\n"
    with pytest.raises(SystemExit):
        training.main([*flags, "everything"])
    assert "got 'everything'" in capsys.readouterr().err


def test_made_up_samples_are_the_batches(small):
    samples = small.samples("cpu")
    for rows, (batch, tokens) in zip(small.rows, small.batches, strict=True):
        widths = samples.widths(rows)
        assert samples.tokens(rows) == tokens
        gathered = samples.gather(samples.send(rows), widths)
        extra = samples.concepts - batch.concepts.shape[1]
        wanted = batch._replace(concepts=torch.nn.functional.pad(batch.concepts, (0, extra), value=PAD))
        for ours, theirs in zip(gathered, wanted, strict=True):
            assert torch.equal(ours, theirs)
        wider = samples.gather(samples.send(rows), Widths(32, 32, samples.concepts))
        assert wider.context.shape[1] == wider.response.shape[1] == 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "prepared"
    prepare(sample_corpus(), folder, vocabulary="train", progress=False)
    return folder


def test_a_whole_run_and_what_26000_steps_would_take(prepared, monkeypatch):
    model, settings = PRESETS["tiny"]
    monkeypatch.setitem(
        PRESETS, "released", (model, dataclasses.replace(settings, log_every=2, validate_every=4))
    )
    (run,) = list(whole_run.whole_runs(prepared, "released", 8, "cpu"))
    assert (run["steps"], run["configuration"]) == (8, "as preset")
    # 25,992 steps and 6,498 validations more.
    more = 25_992 * run["seconds_per_step"] + 6498 * run["validation_seconds"]
    assert run["paper_seconds"] == pytest.approx(run["seconds"] + more)
    assert run["seconds"] > 2 * run["validation_seconds"]
    assert "as preset" in whole_run.report([run])


def test_whole_runs_are_written_as_they_come(prepared, monkeypatch, tmp_path, capsys):
    out = tmp_path / "runs.json"
    made = []

    def run(*_, precision, **__):
        if made:  # those before it are kept by then
            assert json.loads(out.read_text())["results"] == made
        made.append({"configuration": precision, "steps": 4})
        return made[-1]

    monkeypatch.setattr(whole_run, "whole_run", run)
    monkeypatch.setattr(whole_run, "report", lambda runs: f"{len(runs)} runs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("benchmarks.harness.machine", dict)
    whole_run.main(["--data", str(prepared), "--device", "cuda", "--steps", "4", "--out", str(out)])
    assert capsys.readouterr().out == "3 runs\n"
    kept = [run["configuration"] for run in json.loads(out.read_text())["results"]]
    assert kept == ["bfloat16", "tf32", "float32"]
    made.clear()
    whole_run.main(["--data", str(prepared), "--device", "cuda", "--precision", "tf32", "--out", str(out)])
    assert made == [{"configuration": "tf32", "steps": 4}]


def test_a_whole_run_refuses_in_one_line(tmp_path, capsys):
    for flags, said in (
        (["--steps", "1", "--data", "prepared"], "--steps: expected at least 2, got 1"),
        (["--data", str(tmp_path / "none")], f"{tmp_path / 'none'}"),
    ):
        with pytest.raises(SystemExit):
            whole_run.main(flags)
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_gpus_results_are_drawn_in_milliseconds(tmp_path):
    timing = {"median": 0.012, "p20": 0.011, "p80": 0.013}
    rows = [{"configuration": "all", "timing": timing, "u_median": 3.0}]
    images = []
    for device in ("cpu", "cuda"):
        training_report.plot(rows, "released", tmp_path / f"{device}.svg", device)
        images.append((tmp_path / f"{device}.svg").read_text())
    assert images[0] != images[1]
    assert "ms a training step" in images[1]
    assert "u a training step" in images[0]


@pytest.mark.gpu
def test_on_a_gpu(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "workload", lambda *_: small)
    out = tmp_path / "training.json"
    training.main(["--device", "cuda", "--rounds", "2", "--out", str(out)])
    assert "all, CUDA graphs, bfloat16" in capsys.readouterr().out
    kept = json.loads(out.read_text())["results"][0]
    assert kept["parts"]["all"]["matrix products"] > 0.0
    assert all(row["peak_memory_mib"] > 0.0 for row in kept["configurations"])
    captured = Steps(small, [*WITHOUT, "CUDA graphs"], "cuda", dropout=0.0, graph_dropout=0.0)
    plain = Steps(small, [], "cuda", dropout=0.0, graph_dropout=0.0)
    for number in range(50):
        taken, wanted = (float(one.take_number(number)) for one in (captured, plain))
        assert taken == pytest.approx(wanted, rel=1e-3)
