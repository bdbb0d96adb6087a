"""A run evaluated end to end, and the report worked out by hand from a few records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ecore import pretrained
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import Vocabulary
from ecore.errors import InputError
from ecore.evaluation import report
from ecore.evaluation.predictions import evaluate_file
from ecore.evaluation.report import evaluate_run, format_run, run_metrics
from ecore.evaluation.yardsticks import yardsticks
from ecore.files import read_json, write_json
from ecore.generation.decoding import Decoding
from ecore.model import ECore
from ecore.model.weights import save_weights
from ecore.precision import float32_products

from .test_predictions import tiny_model


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    pretrained.save(tiny_model(PreparedData.load(prepared), "hard"), folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "data": {**config["data"], "folder": str(prepared)}})
    return folder


def test_run_end_to_end(run: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = evaluate_run(run, split="valid", limit=40, batch_size=16, progress=False)
    out = run / "evaluation-valid"
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "predictions.jsonl"]
    assert read_json(out / "metrics.json") == metrics
    assert math.isfinite(metrics["ppl"])
    data = PreparedData.load(prepared)
    same = yardsticks(data.train, data.valid, data.vocabulary, np.arange(40))
    assert metrics["yardsticks"] == same
    # The same numbers from the file as from the run.
    again = evaluate_file(out / "predictions.jsonl")
    assert again["samples"] == 40
    assert {name: metrics[name] for name in again} == again
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert run_metrics(records, list(metrics["emotions"]))["ppl_per_sample"] == metrics["ppl_per_sample"]
    printed = capsys.readouterr().out
    for words in ("literature", "ppl_per_sample", "R@relevant", "naive Bayes", "not passed", "best emotions"):
        assert words in printed


def test_another_decoding_and_the_last_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers are the decoding's, the weights the checkpoint's, and the report names both."""
    pointers = read_json(run / "checkpoints.json")
    model = pretrained.load(run)
    with torch.no_grad():
        model.output.bias.add_(torch.randn_like(model.output.bias))
    save_weights(model, run / "checkpoint-000002.safetensors")
    write_json(run / "checkpoints.json", {"best": pointers["last"], "last": "checkpoint-000002"})
    options = {"split": "valid", "limit": 6, "progress": False, "yardsticks": False}
    best = evaluate_run(run, **options, out=run / "best")
    decoding = Decoding("beam", beams=2, max_length=9, no_repeat_ngram=1)
    last = evaluate_run(run, **options, out=run / "last", decoding=decoding, checkpoint="last")
    assert (best["checkpoint"], last["checkpoint"]) == ("checkpoint-final", "checkpoint-000002")
    assert best["ppl"] != last["ppl"]
    assert last["decoding"] == {**best["decoding"], "method": "beam", "beams": 2, "max_length": 9} | {
        "no_repeat_ngram": 1
    }
    printed = capsys.readouterr().out
    assert "greedy, at most 30 words" in printed
    assert "beam, beams 2, length_penalty 1.0, no_repeat_ngram 1, at most 9 words" in printed
    spoken = [
        json.loads(line)["prediction_tokens"].split() for line in (run / "last/predictions.jsonl").open()
    ]
    assert all(len(set(words)) == len(words) <= 9 for words in spoken)
    assert last["rep_3"] == 0.0


@pytest.mark.parametrize("precision, setting", [("float32", "highest"), ("tf32", "high")])
def test_precision_of_products(
    run: Path, monkeypatch: pytest.MonkeyPatch, precision: str, setting: str
) -> None:
    """As on a GPU, but for the device; on a CPU the two are the same, and the file says so."""
    seen = set()
    for name in ("score", "_next"):  # every step of an answer, with logits and without
        method = getattr(ECore, name)

        def watched(*arguments: Any, method: Any = method, name: str = name) -> Any:
            seen.add((name, torch.get_float32_matmul_precision()))
            return method(*arguments)

        monkeypatch.setattr(ECore, name, watched)
    options: dict[str, Any] = {"limit": 2, "yardsticks": False, "progress": False, "precision": precision}
    assert evaluate_run(run, **options)["precision"] == "float32"
    assert seen == {("score", "highest"), ("_next", "highest")}
    seen.clear()
    monkeypatch.setattr(report, "float32_products", lambda _, precision: float32_products("cuda", precision))
    evaluate_run(run, **options)
    assert seen == {("score", setting), ("_next", setting)}
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(InputError, match="precision: expected one of float32, tf32, got 'bfloat16'"):
        evaluate_run(run, **options | {"precision": "bfloat16"})


def test_another_vocabulary_is_refused(run: Path, prepared: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary.load(run / "vocabulary.json")
    swapped = (*vocabulary.words[:-2], *vocabulary.words[:-3:-1])
    other = Vocabulary(swapped, vocabulary.emotions)
    other.save(run / "vocabulary.json")
    config = read_json(run / "config.json")
    config["data"]["vocabulary_fingerprint"] = other.fingerprint
    write_json(run / "config.json", config)
    with pytest.raises(InputError, match="another vocabulary") as caught:
        evaluate_run(run, limit=2, progress=False)
    assert str(prepared) in str(caught.value)
    assert not (run / "evaluation-test").exists()


def test_other_bad_input(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="split: expected one of train, valid, test, got 'dev'"):
        evaluate_run(run, split="dev")
    with pytest.raises(InputError, match="no such folder"):
        evaluate_run(run, data=tmp_path / "none")
    with pytest.raises(InputError, match="no such folder"):
        evaluate_run(tmp_path / "none")
    config = read_json(run / "config.json")
    del config["data"]["folder"]
    write_json(run / "config.json", config)
    with pytest.raises(InputError, match=r"config\.json: names no data folder"):
        evaluate_run(run)


def test_metrics_and_table_by_hand() -> None:
    def record(
        true: str, predicted: str, ranked: str, nll: float, tokens: int, words: int
    ) -> dict[str, object]:
        return {
            "prediction": "oh no",
            "reference": "I am sorry",
            "emotion": true,
            "predicted_emotion": predicted,
            "emotions": [[name, 0.2] for name in ranked],
            "relevant": list(ranked[:2]),
            "nll": nll,
            "tokens": tokens,
            "context_words": words,
        }

    records = [
        record("a", "a", "bacde", 3.0, 3, 10),
        record("b", "a", "bacde", 8.0, 2, 10),
        record("c", "c", "abcde", 5.0, 5, 130),
    ]
    metrics = run_metrics(records, ["a", "b", "c", "d"])
    assert metrics["ppl"] == pytest.approx(math.exp(1.6))
    assert metrics["ppl_per_sample"] == pytest.approx(math.exp(2.0))
    assert metrics["recall_at"] == {"1": pytest.approx(1 / 3), "3": 1.0, "5": 1.0}
    assert metrics["recall_relevant"] == pytest.approx(2 / 3)
    assert metrics["relevant_size"] == 2.0
    assert metrics["accuracy"] == pytest.approx(200 / 3)
    assert metrics["dist_1"] == pytest.approx(100 * 2 / 6)
    assert metrics["human"]["mean_length"] == 3.0
    assert [g["accuracy"] for g in metrics["accuracy_by_context_words"]] == [50.0, None, None, None, 100.0]
    assert metrics["emotions"]["b"]["accuracy"] == 0.0
    assert metrics["emotions"]["d"]["accuracy"] is None

    described = {
        "split": "valid",
        "checkpoint": "checkpoint-000400",
        "strategy": "hard",
        "vocabulary": {"kind": "train", "words": 1234, "fingerprint": "x"},
        "decoding": {"method": "greedy", "max_length": 30},
        "yardsticks": {"unigram": 4.9, "kneser_ney_bigram": 5.0, "naive_bayes_accuracy": 66.7},
    }
    table = format_run(metrics | described)
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "'train' vocabulary of 1,234 words" in table
    assert "comparable with the papers' numbers" in rows["ppl_per_sample"]
    passed = {line.split(",")[0].strip(): line for line in table.splitlines() if "passed" in line}
    assert passed["unigram"].endswith("not passed")  # exp(1.6) = 4.95 is over 4.9
    assert passed["Kneser-Ney bigram"].endswith("  passed")
    assert passed["naive Bayes"].endswith("not passed")
