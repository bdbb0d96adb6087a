import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.tokenize import NLTKWordTokenizer

from ecore.data import text as module
from ecore.data.text import detokenize, tokenize

NLTK_TOKENIZER = NLTKWordTokenizer()


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ""),
        ("   \n ", ""),
        ("Hello World", "hello world"),
        # Sentences are parted where . ? ! meets white space, so no word keeps its full stop.
        ("It is the world. Yes! Why? End.", "it is the world . yes ! why ? end ."),
        ("one.two", "one.two"),
        ("I'm sure you're sad, we'll see", "i am sure you are sad , we will see"),
        ("I've a dog; he'd bark", "i have a dog ; he would bark"),
        ("won't can't shan't didn't isn't", "will not can not shall not did not is not"),
        ("Let's go", "let us go"),
        ("It's what's there's who's", "it is what is there is who is"),
        ("my friend's dog", "my friend 's dog"),
        ("I’m ‘fine’, isn’t it", "i am ' fine ' , is not it"),
        ("He said “wow”", "he said `` wow ''"),
        ("$5, 1,500 (ok)", "$ 5 , 1,500 ( ok )"),
        ("wow!! :)", "wow ! ! : )"),
    ],
)
def test_words(text, words):
    assert tokenize(text) == words.split()


@given(st.text())
def test_words_are_never_empty_and_hold_no_space(text):
    for word in tokenize(text):
        assert word
        assert word.split() == [word]


PLAIN = ("a", "i", "5", "so,", "cannot", "gonna", "wanna", "gimme", "gotta", "lemme")
OTHER = ("1,5", "wow!", "why?!", "well...", "end.", "b.c", "ok??", ",", "-", "'", ")", "$")


@given(st.lists(st.sampled_from(PLAIN + OTHER), min_size=1, max_size=8))
def test_plain_sentences_come_out_as_the_tokenizer_has_them(parts):
    for sentence in module._SENTENCE_END.split(" ".join(parts)):
        assert module._sentence_words(sentence) == NLTK_TOKENIZER.tokenize(sentence)


def test_real_sentences_come_out_as_the_tokenizer_has_them(real_data):
    with open(real_data / "ed" / "valid.jsonl", encoding="utf-8") as file:
        texts = [u["text"] for line in file for u in json.loads(line)["utterances"]][:3000]
    shortened = 0
    for text in texts:
        for sentence in module._SENTENCE_END.split(" ".join(text.lower().split())):
            words = module._sentence_words(sentence)
            assert words == NLTK_TOKENIZER.tokenize(sentence)
            shortened += len(words) > 1 and module._PLAIN_SENTENCE.fullmatch(sentence) is not None
    assert shortened > len(texts) / 2


@given(st.lists(st.sampled_from(("i'm", "ok.", "it's", "Dog", ",", "why?", '"so"', "-")), max_size=12))
def test_words_are_lower_case_and_white_space_does_not_matter(parts):
    words = tokenize(" ".join(parts))
    assert words == [word.lower() for word in words]
    assert words == tokenize("  \t".join(parts) + "\n")


@pytest.mark.parametrize(
    "words, text",
    [
        ("", ""),
        ("i am sorry , i really am . did it hurt ?", "I am sorry, I really am. Did it hurt?"),
        ("`` wow '' , said my friend 's dog !", '"Wow", said my friend\'s dog!'),
        ("that is in indiana and i like it", "That is in indiana and I like it"),
        ("thank you . : ) i am ( really ? ) glad ! !", "Thank you. :) I am (really?) Glad!!"),
        ("well ... yes .. no .... ( ok ) ; [ 5 % ]", "Well... yes.. no.... (ok); [5%]"),
        ("oh no : ( that hurts ; ) : a", "Oh no :( that hurts ;): a"),
        ("he said , `` i can not , i am gon na go . ''", 'He said, "I cannot, I am gonna go."'),
        ("my parents ' $ 5 , # 1 : it did n't", "My parents' $5, #1: it didn't"),
        ("the u.s. , e.g. . ... a -- b / c & d", "The u.s., e.g. . ... A -- b / c & d"),
        ("at peace :0 , do not .you go to a .com ?", "At peace :0, do not .you go to a .com?"),
    ],
)
def test_detokenize(words, text):
    assert detokenize(words.split()) == text


@given(
    st.lists(st.sampled_from(("i", "am", "gon", "na", "so", "that", "5", *",.?!:;()[]$#%&*-")), max_size=15)
)
def test_words_survive_the_way_to_text_and_back(words):
    assert tokenize(detokenize(words)) == words


def test_real_words_survive_the_way_to_text_and_back(real_data):
    with open(real_data / "ed" / "test.jsonl", encoding="utf-8") as file:
        turns = [tokenize(u["text"]) for line in file for u in json.loads(line)["utterances"]]
    assert sum(tokenize(detokenize(words)) != words for words in turns) < len(turns) / 5000
