"""Training: what it logs and validates, when it stops by itself, and what it refuses."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open

from ecore import pretrained
from ecore.config import TrainingConfig
from ecore.errors import InputError
from ecore.files import read_json
from ecore.model import ECore
from ecore.precision import float32_products
from ecore.training import batch_order, trainer
from ecore.training.journal import read_metrics
from ecore.training.run_folder import summarize
from ecore.training.trainer import NotFinite, Trainer, train
from tests.ecore.training.runs import at_call, interrupt, same, weights


def test_log(reference, numbers):
    lines = numbers(reference)
    assert [line["step"] for line in lines] == [1, 3, 5, 6, 9, 10, 12, 13]
    assert [line["step"] for line in lines if "valid_ppl" in line] == [5, 10, 13]
    assert all(line["loss"] > 0 for line in lines)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[2]["lr"] == pytest.approx(0.5 * 12**-0.5 * min(5**-0.5, 5 * 4**-1.5))
    parts = lines[0]["generation"] + lines[0]["emotion"] + lines[0]["correlation"]
    assert lines[0]["loss"] == pytest.approx(parts, rel=1e-6)
    assert "health_perception_std" in lines[0]


def test_log_averages_the_steps_since_the_last_line(quiet_train, settings, numbers, reference, tmp_path):
    quiet_train(tmp_path / "every", replace(settings, log_every=1))
    each = {line["step"]: line for line in numbers(tmp_path / "every")}
    line = {line["step"]: line for line in numbers(reference)}
    for name in ("loss", "emotion"):
        assert line[9][name] == pytest.approx(sum(each[i][name] for i in (7, 8, 9)) / 3)
    assert line[12]["loss"] == pytest.approx(sum(each[i]["loss"] for i in (11, 12)) / 2)


def test_run_folder(reference):
    names = read_json(reference / "checkpoints.json")
    assert names["last"] == "checkpoint-000013"
    config = read_json(reference / "config.json")
    assert config["format"] == 2
    assert config["model"]["dim"] == 12
    assert config["training"]["warmup"] == 4
    assert len(config["data"]["fingerprint"]) == 16
    files = [path for path in reference.iterdir() if not path.name.startswith("events.")]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}
    assert "13 of 13" in summarize(reference)


def test_validation_of_the_first_samples_alone(quiet_train, settings, numbers, data, tmp_path):
    quiet_train(tmp_path / "run", replace(settings, max_steps=5, validate_limit=7))
    model = pretrained.load(tmp_path / "run", "last")
    with torch.no_grad():
        scores = model.score(data.valid.batch(range(7)))
    expected = (scores.nll / scores.tokens).mean().exp().item()
    assert numbers(tmp_path / "run")[-1]["valid_ppl_per_sample"] == pytest.approx(expected, rel=1e-5)
    quiet_train(tmp_path / "more", replace(settings, max_steps=5, validate_limit=10**6))
    quiet_train(tmp_path / "all", replace(settings, max_steps=5))
    assert numbers(tmp_path / "more") == numbers(tmp_path / "all")


def test_validation_is_what_the_model_scores(reference, data):
    model = pretrained.load(reference, "last")
    with torch.no_grad():
        scores = model.score(data.valid.batch(range(len(data.valid))))
    line = read_metrics(reference)[-1]
    assert line["valid_ppl"] == pytest.approx((scores.nll.sum() / scores.tokens.sum()).exp().item(), rel=1e-5)
    per_sample = (scores.nll / scores.tokens).mean().exp().item()
    assert line["valid_ppl_per_sample"] == pytest.approx(per_sample, rel=1e-5)


def test_same_seed_same_run(quiet_train, reference, settings, numbers, tmp_path):
    quiet_train(tmp_path / "again")
    assert numbers(tmp_path / "again") == numbers(reference)
    quiet_train(tmp_path / "other", replace(settings, seed=1))
    assert numbers(tmp_path / "other")[0]["loss"] != numbers(reference)[0]["loss"]


def test_accumulated_gradients_are_the_mean(quiet_train, data, tiny, monkeypatch, tmp_path):
    """Two batches of five step as one of ten; plain gradient descent, since Adam hides a gradient's size."""
    monkeypatch.setattr(trainer, "adam", lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    ten = list(range(10))
    results = {}
    for name, batches in (("one", [ten]), ("two", [ten[:5], ten[5:]])):
        monkeypatch.setattr(batch_order, "length_buckets", lambda *_, b=batches, **__: b)
        config = TrainingConfig(max_steps=1, warmup=1, accumulate=len(batches), factor=0.1)
        still = replace(tiny, dropout=0.0, graph_dropout=0.0)
        train(tmp_path / name, data, still, config, progress=False)
        results[name] = weights(tmp_path / name)
    for name, value in results["one"].items():
        torch.testing.assert_close(value, results["two"][name], rtol=1e-4, atol=1e-6)
    assert read_metrics(tmp_path / "one")[0]["loss"] == pytest.approx(
        read_metrics(tmp_path / "two")[0]["loss"]
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast(quiet_train, settings, numbers, monkeypatch, tmp_path, precision):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, growth_interval=3))
    settings = replace(settings, precision=precision, max_steps=6)
    quiet_train(tmp_path / "reference", settings)
    with monkeypatch.context() as patched:
        at_call(patched, "loss", 3, interrupt)
        quiet_train(tmp_path / "run", settings)
    quiet_train(tmp_path / "run", resume=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "reference")
    assert weights(tmp_path / "run")["output.weight"].dtype == torch.float32
    scales = []
    for run in ("reference", "run"):
        with safe_open(tmp_path / run / "checkpoint-000006.state.safetensors", "pt") as file:
            scales.append(json.loads(file.metadata()["progress"])["scaler"].get("scale"))
    assert scales[0] == scales[1]
    assert (scales[0] is None) == (precision == "bfloat16")


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_products_of_steps_and_validations_alike(
    quiet_train, settings, numbers, monkeypatch, tmp_path, precision
):
    """As on a GPU, but for the device: what is set there is left unset on a CPU."""
    seen = {"loss": set(), "score": set()}
    for name, settings_seen in seen.items():
        method = getattr(ECore, name)

        def watched(*arguments, method=method, settings_seen=settings_seen):
            settings_seen.add(torch.get_float32_matmul_precision())
            return method(*arguments)

        monkeypatch.setattr(ECore, name, watched)
    settings = replace(settings, precision=precision, max_steps=6)
    quiet_train(tmp_path / "cpu", settings)
    assert seen == {"loss": {"highest"}, "score": {"highest"}}
    monkeypatch.setattr(trainer, "float32_products", lambda _, precision: float32_products("cuda", precision))
    for settings_seen in seen.values():
        settings_seen.clear()
    with monkeypatch.context() as patched:
        at_call(patched, "loss", 3, interrupt)
        quiet_train(tmp_path / "run", settings)
    quiet_train(tmp_path / "run", resume=True)
    expected = "high" if precision == "tf32" else "highest"
    assert seen == {"loss": {expected}, "score": {expected}}
    assert torch.get_float32_matmul_precision() == "highest"
    assert json.loads((tmp_path / "run/config.json").read_text())["training"]["precision"] == precision
    assert numbers(tmp_path / "run") == numbers(tmp_path / "cpu")


def test_early_stopping_and_the_best(quiet_train, settings, monkeypatch, tmp_path):
    values = iter([9.0, 8.0, 8.5, 8.0, 1.0])

    def validate(self):
        return {"valid_ppl": 1.0, "valid_ppl_per_sample": next(values), "valid_emotion_accuracy": 0.0}

    monkeypatch.setattr(Trainer, "_validate", validate)
    summary = quiet_train(tmp_path / "run", replace(settings, validate_every=2, patience=2))
    assert summary["stopped_early"]
    assert (summary["step"], summary["best_step"], summary["best_ppl_per_sample"]) == (8, 4, 8.0)
    pointers = read_json(tmp_path / "run/checkpoints.json")
    assert pointers == {"best": "checkpoint-000004", "last": "checkpoint-000008"}
    assert not same(weights(tmp_path / "run"), pretrained.load(tmp_path / "run").state_dict())
    assert quiet_train(tmp_path / "run", resume=True)["step"] == 8


def test_patience_that_ends_at_the_last_step_stops_nothing_early(
    quiet_train, settings, monkeypatch, tmp_path
):
    values = iter([8.0, 9.0])

    def validate(self):
        return {"valid_ppl": 1.0, "valid_ppl_per_sample": next(values), "valid_emotion_accuracy": 0.0}

    monkeypatch.setattr(Trainer, "_validate", validate)
    settings = replace(settings, validate_every=2, patience=1)
    assert not quiet_train(tmp_path / "run", settings, max_steps=4)["stopped_early"]
    assert quiet_train(tmp_path / "run", resume=True, max_steps=8)["stopped_early"]


def test_patience_is_remembered(quiet_train, settings, monkeypatch, tmp_path):
    values = iter([8.0, 9.0, 9.0])

    def validate(self):
        return {"valid_ppl": 1.0, "valid_ppl_per_sample": next(values), "valid_emotion_accuracy": 0.0}

    monkeypatch.setattr(Trainer, "_validate", validate)
    settings = replace(settings, validate_every=2, patience=2)
    quiet_train(tmp_path / "run", settings, max_steps=4)
    summary = quiet_train(tmp_path / "run", resume=True, max_steps=13)
    assert summary["stopped_early"]
    assert (summary["step"], summary["best_step"]) == (6, 2)


def test_patience_does_not_count_a_validation_that_the_end_asked_for(
    quiet_train, settings, monkeypatch, tmp_path
):
    values = iter([8.0, 9.0, 7.0])

    def validate(self):
        return {"valid_ppl": 1.0, "valid_ppl_per_sample": next(values), "valid_emotion_accuracy": 0.0}

    monkeypatch.setattr(Trainer, "_validate", validate)
    settings = replace(settings, validate_every=4, patience=1)
    assert not quiet_train(tmp_path / "run", settings, max_steps=6)["stopped_early"]
    summary = quiet_train(tmp_path / "run", resume=True, max_steps=8)
    assert (summary["step"], summary["best_step"]) == (8, 8)


@pytest.mark.parametrize("term", ["generation", "emotion", "correlation"])
def test_a_loss_that_is_not_finite_stops(quiet_train, monkeypatch, tmp_path, term):
    loss, calls = ECore.loss, iter(range(1, 99))

    def broken(self, batch, *arguments):
        losses = loss(self, batch, *arguments)
        if next(calls) == 8:
            losses = losses._replace(total=losses.total * torch.nan, **{term: torch.tensor(torch.nan)})
        return losses

    monkeypatch.setattr(ECore, "loss", broken)
    with pytest.raises(NotFinite, match=rf"the {term} loss is nan at step 8 \(step 5 is kept"):
        quiet_train(tmp_path / "run")
    assert read_json(tmp_path / "run/checkpoints.json")["last"] == "checkpoint-000005"
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("method, call, step", [("loss", 8, 8), ("score", 1, 5)])
def test_the_hard_strategys_split_stops_too(quiet_train, tiny, monkeypatch, tmp_path, method, call, step):
    """It raises inside the model, before there is a loss to look at."""
    at_call(
        monkeypatch, method, call, lambda model: model.perceiver.perceptron.main.bias.data.fill_(torch.nan)
    )
    with pytest.raises(NotFinite, match=rf"not finite at step {step} \("):
        quiet_train(tmp_path / "run", model_config=replace(tiny, strategy="hard"))


def test_weights_that_are_not_finite_are_never_saved(quiet_train, settings, monkeypatch, tmp_path):
    take_step = Trainer._take_step

    def broken(self):
        take_step(self)
        if self.state.step == 4:
            self.model.output.bias.data[3] = torch.inf

    monkeypatch.setattr(Trainer, "_take_step", broken)
    with pytest.raises(NotFinite, match=r"a weight is not finite at step 4 \(step 2 is kept"):
        quiet_train(tmp_path / "run", replace(settings, checkpoint_every=2))
    assert read_json(tmp_path / "run/checkpoints.json")["last"] == "checkpoint-000002"


def test_existing_folder_is_left_alone(quiet_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty; go on with --resume or choose another folder"):
        quiet_train(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="a file is in the way"):
        quiet_train(tmp_path / "run/thesis.txt")


def test_settings_that_make_no_model_leave_no_folder(quiet_train, data, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "embeddings", torch.zeros(len(data.vocabulary), 50).numpy())
    with pytest.raises(InputError, match="embeddings"):
        quiet_train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_empty_folder_is_welcome(quiet_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.json.7.tmp").write_text("left by a killed process")
    assert quiet_train(tmp_path / "run", max_steps=1)["step"] == 1
