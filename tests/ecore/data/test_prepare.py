import json

import numpy as np
import pytest

from ecore.data import prepared
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.statistics import describe
from ecore.data.vocabulary import SPECIAL_WORDS, Vocabulary
from ecore.errors import InputError
from ecore.files import read_json


def run(data, out, **options):
    return prepare(data, out, progress=False, **options)


@pytest.fixture
def relations(tmp_path):
    path = tmp_path / "relations.tsv"
    path.write_text("head\trelation\ttail\tweight\ndog\tIsA\tparty\t1\njob\tIsA\tlottery\t2\n")
    return path


@pytest.fixture
def glove(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("dog 1 2\n. 3 4\n")
    return path


def test_literature_vocabulary_has_all_splits_and_situations(jsonl_folder, tmp_path):
    meta = run(jsonl_folder, tmp_path / "out")
    words = Vocabulary.load(tmp_path / "out" / "vocabulary.json").words
    assert {"job", "zebra", "alone", "again", "sunshine", "joyful", "sad"} <= set(words)
    # Turns that nobody answers are in no sample.
    assert not {"unanswerable", "lovely"} & set(words)
    assert words[len(SPECIAL_WORDS)] == "."
    assert meta["vocabulary"] == "literature"
    assert meta["min_count"] is None


def test_train_vocabulary_has_frequent_words_of_training_alone(jsonl_folder, tmp_path):
    meta = run(jsonl_folder, tmp_path / "out", vocabulary="train")
    words = Vocabulary.load(tmp_path / "out" / "vocabulary.json").words
    assert {"dog", "died", "won", "joyful"} <= set(words)
    assert not {"job", "zebra", "lottery"} & set(words)
    assert meta["min_count"] == 2
    run(jsonl_folder, tmp_path / "one", vocabulary="train", min_count=1)
    assert "lottery" in Vocabulary.load(tmp_path / "one" / "vocabulary.json")


def test_meta_is_written_and_counts(jsonl_folder, tmp_path, glove, relations, capsys):
    meta = run(jsonl_folder, tmp_path / "out", glove=[glove, glove], relations=relations)
    assert read_json(tmp_path / "out" / "meta.json") == meta
    assert [meta["splits"][name]["samples"] for name in ("train", "valid", "test")] == [4, 1, 1]
    assert meta["splits"]["train"]["conversations"] == 4
    # Contexts: 5 words; 5 + 5 + 6; 7; 5.
    assert meta["splits"]["train"]["context_words"]["mean"] == (5 + 16 + 7 + 5) / 4
    assert meta["splits"]["train"]["context_words"]["max"] == 16
    assert meta["splits"]["train"]["related_words"] == 0.5
    assert meta["glove"] == ["glove.txt", "glove.txt"]
    assert 0 < meta["glove_coverage"]["types"] < meta["glove_coverage"]["tokens"] < 1
    assert not capsys.readouterr().out
    printed = describe(meta)
    assert "vocabulary (literature)" in printed
    assert "matched to 0.15" in printed


def test_intensity_statistics_count_a_turn_in_every_context_that_holds_it(jsonl_folder, tmp_path):
    scores = tmp_path / "scores.tsv"
    scores.write_text("died\t0\nlottery\t0.8\n")
    meta = run(jsonl_folder, tmp_path / "out", intensity="skep", intensity_file=scores, intensity_floor=0)
    # 33 words in all four contexts; died is in two of them, lottery in one.
    assert meta["zero_intensity"] == pytest.approx(30 / 33)
    assert meta["intensity_shares"]["0.075"]["literal"]["words"] == pytest.approx(3 / 33)
    assert meta["intensity_shares"]["0.075"]["literal"]["contexts"] == pytest.approx(3 / 4)
    assert meta["intensity_shares"]["0.15"]["literal"]["contexts"] == pytest.approx(2 / 4)
    # 3/33 words have any intensity: below 10 %, above 3 %; died's own 2/33 is also above 3 %.
    assert meta["thresholds"]["0.075"] == pytest.approx(0.09)
    assert meta["thresholds"]["0.15"] == pytest.approx(0.25, abs=1e-6)
    assert meta["thresholds"]["0.15"] > 0.25


@pytest.mark.parametrize("source", ["vader", "none"])
def test_intensities_are_floored(source, jsonl_folder, tmp_path):
    meta = run(jsonl_folder, tmp_path / "out", intensity=source, intensity_floor=0.02)
    data = PreparedData.load(tmp_path / "out")
    words = data.tables.intensity[len(SPECIAL_WORDS) :]
    assert words.min().item() == pytest.approx(0.02 if source == "vader" else 1)
    assert meta["zero_intensity"] > 0 if source == "vader" else meta["zero_intensity"] == 0


def test_fingerprint_depends_on_the_prepared_data(jsonl_folder, tmp_path, relations):
    first = run(jsonl_folder, tmp_path / "a")
    same = run(jsonl_folder, tmp_path / "b")
    other = run(jsonl_folder, tmp_path / "c", relations=relations)
    assert first["fingerprint"] == same["fingerprint"] != other["fingerprint"]
    assert first["vocabulary_fingerprint"] == other["vocabulary_fingerprint"]


def test_output_folder_that_holds_something_is_left_alone(jsonl_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="out: exists already; expected a new or empty folder"):
        run(jsonl_folder, out)
    assert (out / "thesis.txt").read_text() == "precious"
    with pytest.raises(InputError, match="exists already"):
        run(jsonl_folder, out / "thesis.txt")
    (out / "thesis.txt").unlink()
    run(jsonl_folder, out)
    assert len(PreparedData.load(out).train) == 4


def test_the_current_folder_is_not_replaced(jsonl_folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="is the current folder"):
        run(jsonl_folder, ".")


def test_related_words_are_ranked_by_intensities_without_floor(jsonl_folder, tmp_path):
    rows = [("dog", "happy", 1), ("dog", "job", 1), ("dog", "died", 1)]
    path = tmp_path / "relations.tsv"
    path.write_text("".join(f"{head}\tRelatedTo\t{tail}\t{weight}\n" for head, tail, weight in rows))
    scores = []
    for floor in (0.0, 0.01):
        run(jsonl_folder, tmp_path / str(floor), relations=path, intensity_floor=floor)
        scores.append(PreparedData.load(tmp_path / str(floor)).tables.related_score.numpy())
    assert scores[0].any()
    np.testing.assert_array_equal(*scores)


def test_a_response_too_long_for_the_model_is_refused(jsonl_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ecore.data.prepare.MAX_RESPONSE_WORDS", 3)
    with pytest.raises(
        InputError, match=r"train: conversation \S+: a response of \d+ words; expected at most 3"
    ):
        run(jsonl_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_it_leaves_nothing(error, jsonl_folder, tmp_path, monkeypatch):
    def interrupted(folder):
        assert list(folder.iterdir())
        raise error

    monkeypatch.setattr(prepared, "fingerprint", interrupted)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error):
        run(jsonl_folder, tmp_path / "deep" / "out")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "deep"])


@pytest.mark.parametrize(
    "options, match",
    [
        ({"vocabulary": "all"}, "vocabulary: expected one of literature, train, got 'all'"),
        ({"vocabulary": "train", "min_count": 0}, "min_count: expected at least 1"),
        ({"intensity": "skep"}, "expects a file"),
        ({"intensity_floor": 2.0}, "intensity_floor"),
        ({"glove": ["gone.txt"]}, "gone.txt: no such file"),
        ({"relations": "gone.tsv"}, "gone.tsv: no such file"),
        ({"intensity": "vad", "intensity_file": "gone.tsv"}, "gone.tsv: no such file"),
    ],
)
def test_bad_options(options, match, jsonl_folder, tmp_path):
    with pytest.raises(InputError, match=match):
        run(jsonl_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_skipped_lines_are_counted_and_reported(jsonl_folder, tmp_path):
    with open(jsonl_folder / "train.jsonl", "a") as file:
        file.write("{torn")
    with pytest.raises(InputError, match=r"train\.jsonl:5: not valid JSON"):
        run(jsonl_folder, tmp_path / "out")
    meta = run(jsonl_folder, tmp_path / "out", skip_bad=True)
    assert meta["skipped_lines"]["train.jsonl"] == 1
    assert "bad lines skipped: 1" in describe(meta)


def test_long_contexts_lose_their_oldest_words(jsonl_folder, tmp_path):
    turns = [" ".join(f"w{i}" for i in range(400)), "mid " * 100, "last " * 100, "fine"]
    utterances = [{"speaker": ("speaker", "listener")[i % 2], "text": t} for i, t in enumerate(turns)]
    record = {"conv_id": "long", "emotion": "sad", "situation": "", "utterances": utterances}
    (jsonl_folder / "test.jsonl").write_text(json.dumps(record))
    meta = run(jsonl_folder, tmp_path / "out")
    assert meta["splits"]["test"]["truncated_contexts"] == 1
    assert "cut to their last 512 words: 1" in describe(meta)
    data = PreparedData.load(tmp_path / "out")
    batch = data.test.batch([0, 1])
    assert batch.lengths.tolist() == [401, 513]
    words = data.vocabulary.decode(batch.context[1].tolist())
    assert words == [f"w{i}" for i in range(88, 400)] + ["mid"] * 100 + ["last"] * 100
    assert batch.state[1].tolist() == [3] + [1] * 312 + [2] * 100 + [1] * 100
    assert data.test.texts(1)["context"] == turns[:3]
