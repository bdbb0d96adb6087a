import gzip

import nltk
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecore.data.intensity import (
    MATCHED_SHARES,
    NLTK_SENTIWORDNET,
    matched_thresholds,
    with_floor,
    word_intensity,
)
from ecore.data.vocabulary import SPECIAL_WORDS, UNK
from ecore.errors import InputError

WORDS = (*SPECIAL_WORDS, "good", "bad", "table")


def intensity(source, path=None):
    return word_intensity(WORDS, source, path)[len(SPECIAL_WORDS) :]


def written(tmp_path, text, name="scores.tsv"):
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def test_vader_is_the_squared_distance_from_neutral():
    # VADER's lexicon has good 1.9 and bad -2.5 of -4..4, and does not know a table.
    np.testing.assert_allclose(intensity("vader"), [(1.9 / 8) ** 2, (2.5 / 8) ** 2, 0], rtol=1e-6)
    assert (word_intensity(WORDS, "vader")[: len(SPECIAL_WORDS)] == 0).all()


def test_none_is_one_everywhere():
    assert (word_intensity(WORDS, "none") == 1).all()
    assert (with_floor(word_intensity(WORDS, "none"), 0.01) == 1).all()


@pytest.mark.parametrize("source", ["sentiwordnet", "vad", "skep"])
@pytest.mark.parametrize("name", ["scores.tsv", "scores.tsv.gz"])
@pytest.mark.parametrize("header", ["", "word\teta\n"])
def test_every_file_source_takes_two_columns(source, name, header, tmp_path):
    path = written(tmp_path, header + "Good\t1\n\nbad\t0.25\r\n", name)
    np.testing.assert_allclose(intensity(source, path), [0.25, 0.0625, 0])


def test_skep_ignores_further_columns(tmp_path):
    path = written(tmp_path, "word\tpositivity\tcount\n#\t0.5\t4\ngood\t0.9\t12\n")
    np.testing.assert_allclose(intensity("skep", path), [0.16, 0, 0], atol=1e-7)


def test_vad_takes_the_valence(tmp_path):
    path = written(
        tmp_path, "Word\tValence\tArousal\tDominance\ngood\t0.9\t0.1\t0.2\nbad room\t0.1\t0.1\t0.1\n"
    )
    np.testing.assert_allclose(intensity("vad", path), [0.16, 0, 0], atol=1e-7)


def test_sentiwordnet_as_distributed(tmp_path):
    text = (
        "# SentiWordNet v3.0\n# POS\tID\tPosScore\tNegScore\tSynsetTerms\tGloss\n"
        "a\t1\t0.75\t0\tgood#1 nice#1\tfine\na\t2\t0.25\t0\tgood#2\tkind\nn\t3\t0.5\t0.5\tgood#1\tbenefit\n"
        "a\t4\t0\t1\tbad#1\tnot good\n#\t\n\t\t\t\t\t#\n"
    )
    # good: as adjective (0.75/1 + 0.25/2) / (1 + 1/2), as noun 0; η = 0.5 + half of their mean.
    adjective = (0.75 + 0.125) / 1.5
    expected = [(adjective / 2 / 2) ** 2, 0.25, 0]
    np.testing.assert_allclose(
        intensity("sentiwordnet", written(tmp_path, text)), expected, rtol=1e-6, atol=1e-7
    )


def test_sentiwordnet_by_term(tmp_path):
    text = (
        "term\tpos\tpos_rankweighted\tneg_rankweighted\tpos_mean\tneg_mean\tn_senses\n"
        "good\ta\t0.6\t0\t0.1\t0\t21\ngood\tn\t0.2\t0\t0.1\t0\t4\n"
    )
    np.testing.assert_allclose(
        intensity("sentiwordnet", written(tmp_path, text)), [0.04, 0, 0], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    "source, text, match",
    [
        ("skep", "", "empty; expected word<TAB>score"),
        ("skep", "word\tscore\n", "empty"),
        ("skep", "good\n", ":1: 1 columns; expected word<TAB>score"),
        ("skep", "good\t0.4\nbad\n", ":2: 1 columns where the first line has 2"),
        ("skep", "good\t0.4\nbad\tx\n", ":2: .*'x'; expected"),
        ("skep", "good\t5\n", ":1: score 5 is outside 0 to 1"),
        ("skep", "good\t0.4\n\nbad\t-0.1\n", ":3: score -0.1 is outside 0 to 1"),
        ("skep", "good\tnan\n", ":1: score nan is outside"),
        ("vad", "good\t0.4\t0.1\n", ":1: 3 columns; expected .*NRC-VAD"),
        ("sentiwordnet", "good\t0.4\t0.1\n", ":1: 3 columns; expected .*SentiWordNet"),
        ("sentiwordnet", "a\t1\t0.75\t2\tgood#1\tfine\n", ":1: score 2 is outside"),
        ("sentiwordnet", "a\t1\t0.75\t0\tgood\tfine\n", ":1: term 'good' has no rank"),
        ("sentiwordnet", "a\t1\t0.75\t0\tgood#0\tfine\n", ":1: term 'good#0' has no rank"),
    ],
)
def test_malformed_files(source, text, match, tmp_path):
    with pytest.raises(InputError, match=match):
        intensity(source, written(tmp_path, text))


def test_unreadable_files_and_wrong_arguments(tmp_path):
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"good\t0.5\n" * 99)[:-12])
    (tmp_path / "latin").write_bytes(b"caf\xe9\t0.5\n")
    for path, match in (("gone", "no such file"), ("torn.gz", "cannot be read"), ("latin", "cannot be read")):
        with pytest.raises(InputError, match=match):
            intensity("skep", tmp_path / path)
    with pytest.raises(InputError, match=r"expected one of vader, .* got 'vador'"):
        intensity("vador")
    with pytest.raises(InputError, match="source vad expects a file"):
        intensity("vad")
    with pytest.raises(InputError, match="source vader takes no file"):
        intensity("vader", tmp_path / "gone")


def test_floor_spares_special_words_but_the_unknown():
    bare = word_intensity(WORDS, "vader")
    floored = with_floor(bare, 0.06)
    np.testing.assert_allclose(
        floored[: len(SPECIAL_WORDS)], [0.06 * (i == UNK) for i in range(len(SPECIAL_WORDS))]
    )
    np.testing.assert_allclose(floored[len(SPECIAL_WORDS) :], [0.06, (2.5 / 8) ** 2, 0.06], rtol=1e-6)
    assert (with_floor(bare, 0.0) == bare).all()
    for floor in (-0.1, 0.3):
        with pytest.raises(InputError, match="intensity_floor"):
            with_floor(bare, floor)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.25]), st.integers(0, 50)), min_size=1))
def test_matched_thresholds_pass_the_largest_share_allowed(words):
    values = np.array([c for c, _ in words], dtype=np.float32)
    counts = np.array([n for _, n in words], dtype=np.int64)
    total = max(counts.sum(), 1)
    for literal, threshold in matched_thresholds(values, counts).items():
        share = MATCHED_SHARES[literal]
        assert counts[values >= np.float32(threshold)].sum() / total <= share
        lower = values[values < np.float32(threshold)]
        if lower.size:
            assert counts[values >= lower.max()].sum() / total > share


def test_matched_thresholds_to_the_word():
    values = np.array([0.01, 0.05, 0.1, 0.25], dtype=np.float32)
    within = matched_thresholds(values, np.array([880, 40, 60, 20]))  # passing: 2, 8 and 12 %
    assert within == {0.075: float(values[2]), 0.15: float(values[3])}
    exact = matched_thresholds(values, np.array([900, 0, 70, 30]))  # 3 and 10 %: not above
    assert exact == {0.075: float(values[1]), 0.15: float(values[3])}
    beyond = matched_thresholds(values, np.array([800, 0, 0, 200]))
    assert min(beyond.values()) > values[3]


def test_sentiwordnet_of_nltk(tmp_path, monkeypatch):
    """Without a file NLTK's corpus is read, where its downloader has put it; else the error names both ways."""
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(InputError, match=r"--intensity-file.*nltk\.downloader sentiwordnet"):
        word_intensity(["good"], "sentiwordnet")
    file = tmp_path / NLTK_SENTIWORDNET
    file.parent.mkdir(parents=True)
    file.write_text("# POS\tID\tPosScore\tNegScore\tSynsetTerms\tGloss\na\t1\t0.75\t0\tgood#1\tfine\n")
    expected = word_intensity(["good", "table"], "sentiwordnet", file)
    assert expected[0] == pytest.approx(0.375**2)
    np.testing.assert_array_equal(word_intensity(["good", "table"], "sentiwordnet"), expected)
