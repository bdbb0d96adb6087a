import gzip

import numpy as np
import pytest
import torch

from ecore.data.concepts import MOST_CONCEPTS, related_words, select_related
from ecore.data.vocabulary import PAD, SPECIAL_WORDS, UNK
from ecore.data.word_tables import WordTables
from ecore.errors import InputError

WORDS = (*SPECIAL_WORDS, "dog", "happy", "animal", "beast", "the", "sad", "pet", "of")
ID = {word: i for i, word in enumerate(WORDS)}
INTENSITY = np.array([{"happy": 0.25, "sad": 0.16}.get(word, 0.0) for word in WORDS], dtype=np.float32)
HEADER = "head\trelation\ttail\tweight\tsource\n"


def relations(tmp_path, *rows, header=HEADER):
    path = tmp_path / "relations.tsv.gz"
    lines = ["\t".join((head, kind, tail, str(w), "x")) + "\n" for head, kind, tail, w in rows]
    path.write_bytes(gzip.compress((header + "".join(lines)).encode()))
    return path


def related_to(word, tmp_path, *rows, **options):
    related, score = related_words(relations(tmp_path, *rows, **options), WORDS, INTENSITY)
    assert related.shape == score.shape == (len(WORDS), MOST_CONCEPTS)
    assert related.dtype == np.int32
    assert score.dtype == np.float32
    kept = related[ID[word]] != PAD
    assert (score[ID[word]][~kept] == 0).all()
    return {WORDS[i]: float(s) for i, s in zip(related[ID[word]][kept], score[ID[word]][kept], strict=True)}


@pytest.mark.parametrize("header", [HEADER, ""])
def test_emotional_and_heavy_relations_first(header, tmp_path):
    rows = [
        ("dog", "IsA", "beast", 1),
        ("dog", "IsA", "animal", 0.5),
        ("dog", "RelatedTo", "animal", 0.5),
        ("dog", "IsA", "pet", 3),
        ("dog", "Causes", "happy", 1),
        ("happy", "IsA", "dog", 1),
    ]
    found = related_to("dog", tmp_path, *rows, header=header)
    assert list(found) == ["happy", "pet", "animal", "beast"]  # animal and beast tie
    np.testing.assert_allclose(list(found.values()), [0.5 * 1.2, 0.75 * 0.2, 0.5 * 0.2, 0.5 * 0.2], rtol=1e-6)


def test_what_is_no_related_word(tmp_path):
    rows = [
        ("dog", "IsA", "dog", 1),
        ("dog", "IsA", "the", 1),
        ("dog", "IsA", "of", 1),
        ("dog", "IsA", "unknown", 1),
        ("dog", "IsA", "<unk>", 1),
        ("dog", "Antonym", "sad", 1),
        ("dog", "IsA", "sad", 0),
        ("dog", "IsA", "sad", -2),
        ("unknown", "IsA", "pet", 1),
    ]
    assert related_to("dog", tmp_path, *rows) == {}
    assert related_to("the", tmp_path, ("the", "IsA", "pet", 1)) == {}


@pytest.mark.parametrize(
    "text, line",
    [
        (HEADER + "dog\tIsA\tpet\n", 2),
        (HEADER + "dog\tIsA\tpet\t1\n\ndog\tIsA\tpet\tmuch\n", 4),
        *[(HEADER + f"dog\tIsA\tpet\t{weight}\n", 2) for weight in ("nan", "inf", "1e308", "-1e308")],
        ("dog IsA pet 1\n", 1),
    ],
)
def test_malformed_relations(text, line, tmp_path):
    path = tmp_path / "relations.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"relations\.tsv:{line}: expected head, relation, tail and weight"):
        related_words(path, WORDS, INTENSITY)
    with pytest.raises(InputError, match="no such file"):
        related_words(tmp_path / "gone", WORDS, INTENSITY)


def tables(rows):
    """Tables whose word i is related to ``rows[i]``, words with scores."""
    related = torch.zeros(20, 3, dtype=torch.int32)
    score = torch.zeros(20, 3)
    for word, tails in rows.items():
        for place, (tail, value) in enumerate(tails):
            related[word, place], score[word, place] = tail, value
    return WordTables(torch.ones(20), related, score)


def test_best_distinct_words_that_the_context_lacks():
    known = tables({7: [(10, 0.9), (8, 0.8), (11, 0.3)], 8: [(11, 0.5), (12, 0.5), (10, 0.1)]})
    assert select_related([7, 8, UNK, 7], known) == [10, 11, 12]
    assert select_related([8, 7], known) == [10, 11, 12]
    assert select_related([8, 7], known, most=2) == [10, 11]
    assert select_related([7], known) == [10, 8, 11]
    assert select_related([9], known) == []
    assert select_related([], known) == []


def test_tables_without_relations():
    empty = WordTables(torch.ones(20), torch.zeros(20, 0, dtype=torch.int32), torch.zeros(20, 0))
    assert select_related([7, 8], empty) == []
