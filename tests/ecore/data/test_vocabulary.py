import json

import pytest

from ecore.data.vocabulary import SPECIAL_WORDS, UNK, Vocabulary
from ecore.errors import InputError


@pytest.fixture
def vocabulary():
    return Vocabulary.from_counts({"b": 2, "a": 2, "rare": 1, "top": 9}, ["Joyful", "sad"], min_count=2)


def test_most_frequent_first_and_emotions_always_in(vocabulary):
    assert vocabulary.words == (*SPECIAL_WORDS, "top", "a", "b", "joyful", "sad")
    assert [vocabulary.words[i] for i in vocabulary.emotion_words] == ["joyful", "sad"]
    assert "a" in vocabulary
    assert "rare" not in vocabulary


def test_encode_and_decode(vocabulary):
    ids = vocabulary.encode(["a", "rare", "top"])
    assert ids == [6, UNK, 5]
    assert vocabulary.decode([2, *ids, 3, 0]) == ["a", "top"]


def test_save_and_load(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert (loaded.words, loaded.emotions) == (vocabulary.words, vocabulary.emotions)
    assert loaded.fingerprint == vocabulary.fingerprint


def test_fingerprint_depends_on_order_and_emotions(vocabulary):
    others = (
        Vocabulary((*vocabulary.words[:-2], "sad", "joyful"), vocabulary.emotions),
        Vocabulary(vocabulary.words, vocabulary.emotions[::-1]),
    )
    assert len({vocabulary.fingerprint, *(other.fingerprint for other in others)}) == 3


@pytest.mark.parametrize(
    "words, emotions",
    [
        (("a", *SPECIAL_WORDS, "sad"), ["sad"]),
        ((*SPECIAL_WORDS, "sad", "sad"), ["sad"]),
        ((*SPECIAL_WORDS, "a"), ["sad"]),
        ((*SPECIAL_WORDS, "sad"), []),
        ((*SPECIAL_WORDS, "sad"), ["sad", "sad"]),
    ],
)
def test_broken_rules_are_refused(words, emotions, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        Vocabulary(words, emotions)
    (tmp_path / "v.json").write_text(json.dumps({"words": words, "emotions": emotions}))
    with pytest.raises(InputError, match=r"v\.json: not a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"words": 3, "emotions": []}', "nonsense"])
def test_a_file_that_is_no_vocabulary(content, tmp_path):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(InputError, match=r"v\.json"):
        Vocabulary.load(tmp_path / "v.json")
