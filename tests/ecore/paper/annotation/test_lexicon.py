"""The lexicon of Table 12: which words say an emotion, and which emotions are secondary."""

import os
from pathlib import Path

import pytest

import ecore
from ecore.data.corpus import read_split
from ecore.errors import InputError
from ecore.paper.annotation.lexicon import TABLE_12, LexiconAnnotator, count_emotions, secondary_emotions
from tests.ecore.paper.annotation.dialogues import EMOTIONS, conversation


def test_words_match_by_stem_and_count_in_the_order_of_first_mention():
    counts = count_emotions(["I was scared, so scared.", "Let us hope! We hoped and are hopeful."])
    assert list(counts.items()) == [("afraid", 2), ("hopeful", 3)]


@pytest.mark.parametrize(
    "text, emotions",
    [
        ("I made a maid of it", []),  # no "mad" in "made"
        ("I am sick of it, sick, of it", ["disgusted"]),  # two words in a row, once
        ("elated", ["excited", "joyful"]),
        ("She was panic-stricken.", ["terrified"]),
        ("the end of", []),
        ("", []),
    ],
)
def test_matching(text, emotions):
    counts = count_emotions([text])
    assert sorted(counts) == emotions
    assert set(counts.values()) <= {1}


def test_a_phrase_does_not_reach_across_turns():
    assert not count_emotions(["I am sick", "of it"])


def test_every_emotion_of_the_sample_corpus_is_a_word_of_its_own():
    sample = Path(ecore.__file__).parent / "data" / "sample" / "train.jsonl"
    emotions = {c.emotion for c in read_split(sample)[0]}
    assert emotions == set(TABLE_12)
    for emotion in emotions:
        assert emotion in count_emotions([emotion])


def test_secondary_emotions_leave_out_the_label_and_the_situation():
    result = secondary_emotions(
        [
            conversation("a", "sad", "I was sad.", "I hope not.", situation="I was furious."),
            conversation("b", "sad", "I was sad.", "Okay."),
            conversation("c", "sad", "I am angry, jealous.", "I trust you."),
            conversation("d", "sad", "Nothing.", "Okay."),
        ]
    )
    assert result.by_number == (2, 1, 0, 1)
    assert (result.samples, result.share, result.any_word) == (4, 50.0, 3)
    with pytest.raises(InputError):
        secondary_emotions([])


def test_the_lexicon_ranks_by_count_then_mention():
    said = conversation("a", "sad", "I was sad and afraid.", "Grateful? afraid? furious?")
    assert LexiconAnnotator(EMOTIONS).annotate(said) == ("afraid", "sad", "grateful")
    with pytest.raises(InputError, match="no words for gloomy"):
        LexiconAnnotator(["gloomy"])


@pytest.mark.skipif("ECORE_DATA" not in os.environ, reason="ECORE_DATA names no folder of real data")
def test_secondary_emotions_of_real_data():
    conversations, _ = read_split(Path(os.environ["ECORE_DATA"]) / "ed" / "test.jsonl")
    result = secondary_emotions(conversations)
    assert result.samples == 2547
    assert 0.65 < result.share / 100 < 0.75
    assert sum(result.by_number[5:]) / result.samples < 0.01  # "almost no five or more", Appendix B
