"""Differences of two models on the same samples, beside a bootstrap written out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ecore.cli import main
from ecore.errors import InputError
from ecore.evaluation.comparison import compare, paired_records, predictions_of

pytest.importorskip("scipy", reason="needs SciPy")


def records(seed, count=300, worse=0.0, wrong=0.3):
    samples, model = np.random.default_rng(7), np.random.default_rng(seed)
    made = []
    for number in range(count):
        tokens = int(samples.integers(3, 20))
        nll = tokens * samples.uniform(2.0, 5.0) + model.normal(worse, 1.0)
        made.append(
            {
                "prediction": "yes",
                "reference": f"reference {number}",
                "context": ["hello"],
                "nll": float(max(nll, 0.1)),
                "tokens": tokens,
                "emotion": "proud",
                "predicted_emotion": "sad" if model.random() < wrong else "proud",
            }
        )
    return made


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_intervals_are_a_paired_bootstraps():
    first, second = records(1), records(2, worse=0.3, wrong=0.5)
    found = {row.metric: row for row in compare(first, second, resamples=4000)}
    nll = np.array([[r["nll"] for r in x] for x in (first, second)])  # [2, n]
    tokens = np.array([r["tokens"] for r in first])
    right = np.array([[r["predicted_emotion"] == r["emotion"] for r in x] for x in (first, second)])
    drawn = np.random.default_rng(3).integers(0, 300, (4000, 300))  # [resamples, n]
    oracle = {
        "ppl_per_sample": lambda i: np.exp((nll[:, i] / tokens[i]).mean(-1)),
        "ppl": lambda i: np.exp(nll[:, i].sum(-1) / tokens[i].sum(-1)),
        "accuracy, %": lambda i: 100.0 * right[:, i].mean(-1),
    }
    assert found.keys() == oracle.keys()
    for name, metric in oracle.items():
        row, whole, resampled = found[name], metric(np.arange(300)), metric(drawn)
        assert (row.first, row.second) == pytest.approx(tuple(whole))
        low, high = np.quantile(resampled[1] - resampled[0], [0.025, 0.975])
        assert row.low == pytest.approx(low, abs=0.08 * (high - low))
        assert row.high == pytest.approx(high, abs=0.08 * (high - low))
    # Pairing matters: samples differ from each other far more than the models do.
    unpaired = np.exp((nll[1][drawn] / tokens[drawn]).mean(-1)).std()
    assert found["ppl_per_sample"].high - found["ppl_per_sample"].low < unpaired


def test_a_model_and_itself():
    assert all(row.low == row.high == 0.0 for row in compare(records(1), records(1), resamples=100))


def test_metrics_that_both_have():
    plain = [{k: v for k, v in r.items() if k not in ("emotion", "predicted_emotion")} for r in records(1)]
    assert [row.metric for row in compare(plain, records(2), 100)] == ["ppl_per_sample", "ppl"]
    texts = [{"prediction": "a", "reference": "b"}] * 3
    with pytest.raises(InputError, match="share neither nll and tokens nor perceived emotions"):
        compare(texts, texts)
    with pytest.raises(InputError, match="expected numbers as 'nll'"):
        compare([{**records(1)[0], "nll": "many"}], records(2)[:1])


def test_command(tmp_path, capsys):
    run = tmp_path / "run" / "evaluation-test"
    run.mkdir(parents=True)
    written(run / "predictions.jsonl", records(1))
    second = written(tmp_path / "second.jsonl", records(2, worse=3.0))
    assert predictions_of(run) == predictions_of(run.parent) == run / "predictions.jsonl"
    assert main(["compare", str(run.parent), str(second), "--resamples", "200"]) == 0
    printed = capsys.readouterr().out
    assert "300 samples, 200 resamples" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("ppl_per_sample")]
    assert "+" in line.split()[3]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: lines[:-1], "expected the 300 samples of .*, got 299$"),
        (lambda lines: [lines[1], *lines[1:]], "sample 1: not the sample of"),
        (lambda lines: [{**lines[0], "tokens": 99}, *lines[1:]], "sample 1: .*or counted in other words$"),
    ],
)
def test_other_samples_are_refused(tmp_path, change, message):
    first = written(tmp_path / "first.jsonl", records(1))
    second = written(tmp_path / "second.jsonl", change(records(2)))
    with pytest.raises(InputError, match=message):
        paired_records(first, second)


def test_bad_arguments(tmp_path, capsys):
    file = written(tmp_path / "first.jsonl", records(1))
    assert main(["compare", str(tmp_path), str(file)]) == 2
    assert "no predictions in it; `ecore evaluate` writes them" in capsys.readouterr().err
    assert main(["compare", str(file), str(file), "--resamples", "1"]) == 2
    assert "--resamples: expected at least 100, got 1" in capsys.readouterr().err


def test_too_few_samples_and_no_tokens_are_refused(tmp_path, capsys):
    one = written(tmp_path / "one.jsonl", records(1, count=1))
    assert main(["compare", str(one), str(one)]) == 2
    assert "at least two samples to draw from, got 1" in capsys.readouterr().err
    empty = [record | {"tokens": 0} for record in records(1, count=3)]
    with pytest.raises(InputError, match="at least one token in every sample"):
        compare(empty, empty)
    huge = [record | {"nll": 1e300} for record in records(1, count=3)]
    with pytest.raises(InputError, match="at most 700 as 'nll' of a token"):
        compare(huge, huge)
