"""The predictions file: written in order whatever the batches, read back with clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ecore.config import ModelConfig
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.text import detokenize, tokenize
from ecore.demo import sample_corpus
from ecore.errors import InputError
from ecore.evaluation.predictions import (
    evaluate_file,
    predict,
    read_predictions,
    text_metrics,
    write_predictions,
)
from ecore.evaluation.report import format_file
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.model import ECore

KEYS = {
    "conv_id", "turn", "context", "reference", "prediction", "emotion", "predicted_emotion", "emotions",
    "nll", "tokens", "context_words", "prediction_tokens", "reference_tokens",
}  # fmt: skip


def tiny_model(data: PreparedData, strategy: str = "soft") -> ECore:
    torch.manual_seed(0)
    config = ModelConfig(dim=24, encoder_blocks=1, decoder_blocks=1, strategy=strategy)
    model = ECore(config, data.vocabulary, data.tables)
    with torch.no_grad():  # at random weights answers hardly differ: sharpen what is decided at the end
        model.output.weight *= 8
    return model.eval()


@pytest.mark.parametrize("strategy", ["soft", "hard"])
def test_records_are_those_of_each_sample_alone(prepared: Path, strategy: str) -> None:
    data = PreparedData.load(prepared)
    model = tiny_model(data, strategy)
    model.train()  # predict has to leave dropout out
    decoding = Decoding(max_length=6)
    records = predict(model, data.test, decoding, batch_size=5, limit=13, progress=False)
    assert len(records) == 13
    for sample, record in enumerate(records):
        batch = data.test.batch([sample])
        with torch.no_grad():
            scores, words = model.score(batch), generate(model, batch, decoding)[0]
        text = data.test.texts(sample)
        assert set(record) == KEYS | ({"relevant"} if strategy == "hard" else set())
        for name, source in (("conv_id", "conv_id"), ("context", "context"), ("reference", "response")):
            assert record[name] == text[source]
        assert record["emotion"] == data.vocabulary.emotions[batch.emotion[0]]
        assert record["nll"] == pytest.approx(float(scores.nll[0]), rel=1e-5)
        assert record["tokens"] == (batch.response[0] > 0).sum()
        assert record["context_words"] == batch.lengths[0] - 1
        assert record["prediction"] == detokenize(data.vocabulary.decode(words))
        assert record["prediction_tokens"].split(" ") == data.vocabulary.decode(words)
        assert record["reference_tokens"].split(" ") == tokenize(text["response"])
        assert (
            record["predicted_emotion"]
            == data.vocabulary.emotions[scores.encoding.perceived.main_logits[0].argmax()]
        )
        attention = scores.encoding.perceived.emotion_attention[0]
        top = attention.softmax(0).topk(5)
        assert [name for name, _ in record["emotions"]] == [data.vocabulary.emotions[i] for i in top.indices]
        assert [p for _, p in record["emotions"]] == pytest.approx(top.values.tolist(), abs=1e-5)
        if strategy == "hard":
            relevant = scores.encoding.perceived.relevant[0].nonzero().squeeze(1).tolist()
            assert set(record["relevant"]) == {data.vocabulary.emotions[i] for i in relevant}
            assert record["relevant"][0] == record["emotions"][0][0]
    assert len({record["prediction"] for record in records}) > 1


def test_written_and_read_back(prepared: Path, tmp_path: Path) -> None:
    data = PreparedData.load(prepared)
    path = tmp_path / "predictions.jsonl"
    records = write_predictions(tiny_model(data), data.valid, path, limit=4, progress=False)
    assert read_predictions(path) == records
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="is a folder; expected a file"):
        write_predictions(tiny_model(data), data.valid, tmp_path)
    with pytest.raises(InputError, match="folder does not exist"):
        write_predictions(tiny_model(data), data.valid, tmp_path / "none" / "p.jsonl")
    for options in ({"limit": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match="at least 1, got 0"):
            predict(tiny_model(data), data.valid, progress=False, **options)


def test_references_keep_the_words_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    prepare(sample_corpus(), tmp_path, vocabulary="train", min_count=3, progress=False)
    data = PreparedData.load(tmp_path)
    records = predict(tiny_model(data), data.test, Decoding(max_length=3), limit=20, progress=False)
    words = [record["reference_tokens"].split(" ") for record in records]
    assert words == [tokenize(record["reference"]) for record in records]
    assert any(word not in data.vocabulary for spoken in words for word in spoken)


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return path


def test_anybodys_file(tmp_path: Path) -> None:
    def line(prediction: str, reference: str, emotion: str, predicted: str) -> dict[str, str]:
        texts = {"prediction": prediction, "reference": reference}
        return texts | {"emotion": emotion, "predicted_emotion": predicted}

    lines = write_lines(
        tmp_path / "p.jsonl",
        line("I'm sorry. I'm sorry!", "Oh no", "sad", "sad"),
        "",
        line("oh", "Why?", "sad", "joyful") | {"more": 1},
        line("", "oh no", "proud", "sad"),
    )
    result = evaluate_file(lines)
    del result["bleu_4"], result["bleu_signature"]  # tests/ecore/evaluation/test_bleu.py
    # i am sorry . i am sorry ! | oh: 6 words of 9; i-am am-sorry sorry-. .-i i-am am-sorry sorry-!: 5 of 7.
    assert result == {
        "samples": 3,
        "dist_1": pytest.approx(100 * 6 / 9),
        "dist_2": pytest.approx(100 * 5 / 7),
        "rep_3": pytest.approx(100 * 1 / 6),
        "mean_length": 3.0,
        "accuracy": pytest.approx(100 / 3),
        "human": {
            "dist_1": pytest.approx(100 * 4 / 6),
            "dist_2": pytest.approx(100 * 2 / 3),
            "rep_3": 0.0,
            "mean_length": 2.0,
        },
    }
    table = format_file(evaluate_file(lines))
    assert "66.67" in table
    assert "71.43" in table
    assert "33.33" in table
    bare = write_lines(tmp_path / "bare.jsonl", {"prediction": "a", "reference": "b"})
    assert "accuracy" not in evaluate_file(bare)


def test_words_are_counted_from_tokens_where_a_record_has_both(tmp_path: Path) -> None:
    texts = {"prediction": "It's that's.", "reference": "Oh no"}
    tokens = {"prediction_tokens": "a 's b", "reference_tokens": ""}
    for more, lengths in (
        (tokens, (3.0, 0.0)),
        ({"prediction_tokens": "a"}, (5.0, 2.0)),
        ({"reference_tokens": "a"}, (5.0, 2.0)),
    ):
        result = evaluate_file(write_lines(tmp_path / "p.jsonl", texts | more))
        assert (result["mean_length"], result["human"]["mean_length"]) == lengths
    mixed = text_metrics([texts | tokens, texts])
    assert (mixed["mean_length"], mixed["human"]["mean_length"]) == (4.0, 1.0)


@pytest.mark.parametrize(
    "lines, complaint",
    [
        (['{"prediction": "a", "reference": "b"}', '{"prediction": "a"'], r":2: not valid JSON"),
        (['["a", "b"]'], r":1: expected an object"),
        (['{"prediction": "a"}'], r":1: expected 'reference' to be text, it is missing"),
        (["", '{"prediction": null, "reference": "b"}'], r":2: expected 'prediction' to be text, got None"),
        (
            [
                '{"prediction": "a", "reference": "b", "emotion": "sad", "predicted_emotion": "sad"}',
                '{"prediction": "a", "reference": "b"}',
            ],
            r":2: expected 'emotion' and 'predicted_emotion' as on the first line",
        ),
        (
            [
                '{"prediction": "a", "reference": "b"}',
                '{"prediction": "a", "reference": "b", "emotion": "sad", "predicted_emotion": "sad"}',
            ],
            r":2: expected .* to be missing as on the first line",
        ),
        (
            ['{"prediction": "a", "reference": "b", "emotion": 3, "predicted_emotion": "sad"}'],
            r":1: expected 'emotion' to be text, got 3",
        ),
        (
            ['{"prediction": "a", "reference": "b", "prediction_tokens": ["a"]}'],
            r":1: expected 'prediction_tokens' to be text, words with spaces between them, got \['a'\]",
        ),
        (
            [
                '{"prediction": "a", "reference": "b"}',
                '{"prediction": "a", "reference": "b", "reference_tokens": null}',
            ],
            r":2: expected 'reference_tokens' to be text, .* got None",
        ),
        (["", " "], r": no predictions in it"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, lines: list[str], complaint: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(InputError, match=r"bad\.jsonl" + complaint) as caught:
        evaluate_file(path)
    assert "\n" not in str(caught.value)


def test_missing_or_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prediction": "caf\xe9"}\n')
    for name, complaint in (
        ("none", "no such file"),
        ("latin.jsonl", "cannot be read"),
        ("", "cannot be read"),
    ):
        with pytest.raises(InputError, match=complaint):
            evaluate_file(tmp_path / name)
