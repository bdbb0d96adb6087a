"""Annotating dialogues with several emotions: annotators, screening, review, agreement, and their command."""

import argparse
import csv
import json
import os
import threading
from pathlib import Path

import pytest

import ecore
from ecore.cli.annotate import declare_annotate, run_annotate
from ecore.data.corpus import Conversation, read_split
from ecore.data.prepare import prepare
from ecore.errors import InputError
from ecore.evaluation.multi_emotion import read_multi_emotion, write_labels
from ecore.paper.annotation.agreement import alpha, label_agreement
from ecore.paper.annotation.annotators import FileAnnotator, NoAnnotation
from ecore.paper.annotation.lexicon import TABLE_12, LexiconAnnotator, count_emotions, secondary_emotions
from ecore.paper.annotation.pipeline import annotate, read_conversations, run, screen
from ecore.paper.annotation.review import read_sheet, refuse_marked, strike, write_sheet

EMOTIONS = ("afraid", "grateful", "joyful", "sad")


def conversation(conv_id="a", emotion="sad", *turns, situation="A secret."):
    return Conversation(conv_id, emotion, situation, turns or ("My dog died.", "Oh no."))


# the lexicon


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


# label files


def labels_file(path, **labels):
    path.write_text("".join(json.dumps({"conv_id": i, "emotions": e}) + "\n" for i, e in labels.items()))
    return path


def test_label_files_vote(tmp_path):
    one = labels_file(tmp_path / "1", a=["sad", "afraid"], b=[])
    two = labels_file(tmp_path / "2", a=["afraid", "joyful"])
    said = conversation("a")
    assert FileAnnotator([one], EMOTIONS).annotate(said) == ("sad", "afraid")
    assert FileAnnotator([one], EMOTIONS).annotate(conversation("b")) == ()
    assert FileAnnotator([one, two], EMOTIONS).annotate(said) == ("afraid", "sad", "joyful")
    assert FileAnnotator([one, two], EMOTIONS, votes=2).annotate(said) == ("afraid",)
    three = labels_file(tmp_path / "3", a=["joyful", "afraid", "grateful", "sad"])
    four = labels_file(tmp_path / "4", a=["sad"])  # two votes count more than one first place
    assert FileAnnotator([three, four], EMOTIONS).annotate(said) == ("sad", "joyful", "afraid", "grateful")
    with pytest.raises(NoAnnotation):
        FileAnnotator([one, two], EMOTIONS).annotate(conversation("b"))
    with pytest.raises(InputError, match="1 to 2"):
        FileAnnotator([one, two], EMOTIONS, votes=3)
    with pytest.raises(InputError, match="the same file twice"):
        FileAnnotator([one, one], EMOTIONS)
    with pytest.raises(InputError, match="2:1: unknown emotion 'joyful'"):
        FileAnnotator([one, two], ("sad", "afraid"))


# screening


class Says:
    """Annotates with what it was given; an exception is raised."""

    name = "says"

    def __init__(self, **answers):
        self.answers = answers

    def annotate(self, conversation):
        answer = self.answers[conversation.conv_id]
        if isinstance(answer, BaseException):
            raise answer
        return tuple(answer.split())


FOUR = [
    conversation("a", "sad", "=1+1", "Yes.", 'He said "no", twice.'),
    conversation("b", "sad"),
    conversation("c", "joyful"),
    conversation("d", "afraid"),
]
SAID = {
    "a": "joyful sad afraid",
    "b": "joyful afraid",
    "c": "joyful grateful",
    "d": "afraid",
}


def test_screening_wants_several_emotions_and_the_true_one_first():
    labels = {i: tuple(names.split()) for i, names in SAID.items()}
    assert screen(FOUR, labels) == {"a": ("sad", "joyful", "afraid"), "c": ("joyful", "grateful")}


def test_a_run_writes_what_it_counts(tmp_path):
    said = {**SAID, "b": NoAnnotation("asleep")}
    summary = run(FOUR, Says(**said), tmp_path, progress=False)
    assert summary == {
        "annotator": "says",
        "conversations": 4,
        "annotated": 3,
        "several": 2,
        "screened": 2,
        "labels_per_sample": 2.5,
        "problems": {"b": "asleep"},
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    true = {c.conv_id: c.emotion for c in FOUR}
    labels = read_multi_emotion(tmp_path / "labels.jsonl", EMOTIONS, true)
    assert labels == {"a": ("sad", "joyful", "afraid"), "c": ("joyful", "grateful")}
    assert '{"conv_id": "d", "emotions": ["afraid"]}\n' in (tmp_path / "annotations.jsonl").read_text()
    assert not any(read_sheet(tmp_path / "review.csv", labels).values())


@pytest.mark.parametrize("error", [InputError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_ends_the_work_leaves_no_files_and_wakes_who_waits(tmp_path, error, jobs):
    stopped = threading.Event()
    with pytest.raises(type(error)):
        run(FOUR, Says(**{**SAID, "c": error}), tmp_path, jobs, stopped, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert stopped.is_set() or jobs == 1


def test_nothing_to_annotate():
    with pytest.raises(InputError, match="no conversations"):
        annotate([], Says(), progress=False)
    with pytest.raises(InputError, match="--jobs"):
        annotate(FOUR, Says(**SAID), jobs=0, progress=False)


# review

LABELS = {"a": ("sad", "joyful", "afraid"), "c": ("joyful", "grateful")}


@pytest.fixture
def sheet(tmp_path):
    path = tmp_path / "review.csv"
    write_sheet(path, FOUR, LABELS)
    return path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8-sig")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_strikes_come_back(sheet):
    assert sheet.read_bytes().startswith("\ufeffsample".encode())  # spreadsheets need the mark to see UTF-8
    edit(sheet, "sad,joyful,", "sad,joyful, X ")
    strikes = read_sheet(sheet, LABELS)
    assert strikes == {("a", "joyful"): True, ("a", "afraid"): False, ("c", "grateful"): False}
    assert strike(LABELS, [strikes]) == {"a": ("sad", "afraid"), "c": ("joyful", "grateful")}


def test_no_cell_is_a_formula(sheet):
    assert "=1+1" in sheet.read_text(encoding="utf-8-sig")
    assert not any(cell.startswith(("=", "+", "@", '"=')) for cell in sheet.read_text().split(","))


def test_what_a_spreadsheet_does_is_no_damage(sheet):
    text = sheet.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    head, *rows = text.strip().split("\n2,")
    first = head.split("\n", 1)
    text = f"{first[0]}\n2,{rows[0]}\n\n{first[1]}\n".replace("joyful,grateful,", "joyful,grateful,x")
    sheet.write_text(text.replace(",", ";").replace('"no";', '"no",'), encoding="utf-8")
    assert read_sheet(sheet, LABELS)[("c", "grateful")]
    # Tabs in UTF-16, blank rows above and between, blank columns behind.
    added = "".join(f"{line}\t\t\n" for line in text.replace(",", "\t").split("\n"))
    sheet.write_text("\t\t\n" + added + " \n", encoding="utf-16")
    assert read_sheet(sheet, LABELS)[("c", "grateful")]


@pytest.mark.parametrize(
    "name", ["=1+1", "@me", "-x", "0012", "1e5", "1/2", "'quoted", "plain", "hit:1_conv:2"]
)
def test_names_come_back_whatever_a_spreadsheet_would_make_of_them(tmp_path, name):
    """Behind an apostrophe no cell is a formula, a number or a date."""
    labels = {name: (name, "sad")}
    write_sheet(tmp_path / "s.csv", [conversation(name, name)], labels)
    assert read_sheet(tmp_path / "s.csv", labels) == {(name, "sad"): False}
    _, row = csv.reader((tmp_path / "s.csv").read_text(encoding="utf-8-sig").splitlines())
    for cell in (row[1], row[3]):
        assert cell == name if name in ("plain", "hit:1_conv:2") else cell == "'" + name


def test_what_labels_are_made_from_is_not_overwritten(sheet, tmp_path):
    write_labels(tmp_path / "labels.jsonl", LABELS)
    edit(sheet, "sad,joyful,", "sad,joyful,x")
    for file in ("labels.jsonl", "review.csv"):
        before = (tmp_path / file).read_bytes()
        with pytest.raises(InputError, match="would overwrite what it is made from"):
            command("review", tmp_path, "--out", tmp_path / file)
        assert (tmp_path / file).read_bytes() == before


def test_labels_of_another_corpus_leave_no_files(tmp_path):
    other = labels_file(tmp_path / "1", z=["sad", "afraid"])
    with pytest.raises(
        InputError, match=r"no dialogue of 4 was annotated, \w+ first: not in the file of labels"
    ):
        run(FOUR, FileAnnotator([other], EMOTIONS), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "old, new, line, message",
    [
        ("sad,joyful,", "sad,joyful,maybe", 2, "strike: expected x or nothing, got 'maybe'"),
        ("sad,afraid,", "sad,grateful,", 5, "no such label: 'a', true emotion 'sad', emotion 'grateful'"),
        ("sad,afraid,", "joyful,afraid,", 5, "no such label"),
        ("1,a,,sad", "1,b,,sad", 5, "no such label: 'b'"),
        ("sad,afraid,", "sad,sad,", 5, "no such label"),
        ("sad,afraid,", "sad,joyful,", 5, "'joyful' of a again"),
        ("sad,afraid,", "sad", 5, "torn row: expected 6 fields, got 4"),
        ("sad,afraid,", "sad,afraid,,x", 5, "torn row: expected 6 fields, got 7"),
        ("conv_id,", "id,", 1, "expected the columns sample, conv_id"),
        ('twice."', "twice.", 2, "torn row"),
    ],
)
def test_damage_is_told_by_line(sheet, old, new, line, message):
    edit(sheet, old, new)
    with pytest.raises(InputError) as error:
        read_sheet(sheet, LABELS)
    assert str(error.value).startswith(f"{sheet}:{line}: ")
    assert message in str(error.value)


def test_a_spreadsheet_may_leave_out_the_last_empty_cells(sheet):
    edit(sheet, "sad,joyful,", "sad,joyful,x")
    whole = read_sheet(sheet, LABELS)
    edit(sheet, "sad,afraid,", "sad,afraid")
    assert read_sheet(sheet, LABELS) == whole
    assert sum(whole.values()) == 1


def test_missing_rows_and_files(sheet, tmp_path):
    edit(sheet, "1,a,,sad,afraid,", "")
    with pytest.raises(InputError, match="1 of 3 rows are missing, first 'afraid' of a"):
        read_sheet(sheet, LABELS)
    with pytest.raises(InputError, match="no such file"):
        read_sheet(tmp_path / "none.csv", LABELS)
    sheet.write_text("")
    with pytest.raises(InputError, match="expected the columns"):
        read_sheet(sheet, LABELS)
    sheet.write_bytes(b"sample,conv_id\n1,\x81\n")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_sheet(sheet, LABELS)


def test_half_of_the_reviewers_strike():
    def sheet(*struck):
        asked = (("a", "joyful"), ("a", "afraid"), ("c", "grateful"))
        return {label: label in struck for label in asked}

    sheets = [sheet(("a", "joyful"), ("c", "grateful")), sheet(("c", "grateful")), sheet()]
    assert strike(LABELS, sheets) == {"a": ("sad", "joyful", "afraid")}
    assert strike(LABELS, sheets[:2]) == {"a": ("sad", "afraid")}


def test_a_reviewed_sheet_is_not_overwritten(sheet, tmp_path):
    refuse_marked(sheet)
    refuse_marked(tmp_path / "none.csv")
    edit(sheet, "sad,joyful,", "sad,joyful,x")
    before = sheet.read_bytes()
    with pytest.raises(InputError, match="has strikes, which would be lost"):
        run(FOUR, Says(), tmp_path, progress=False)
    assert sheet.read_bytes() == before


# agreement


def test_alpha_of_the_literature():
    # Krippendorff (2011), "Computing Krippendorff's alpha-reliability", section C: four observers, missing values.
    rows = {"A": "123321412   ", "B": "1233224125 3", "C": " 3332342251 ", "D": "12332441251 "}
    answers = [(name, i, value) for name, row in rows.items() for i, value in enumerate(row) if value != " "]
    assert alpha(answers) == pytest.approx(0.743, abs=5e-4)


def test_alpha_that_is_not_defined():
    assert alpha([("x", 1, "a"), ("y", 1, "a")]) is None
    assert alpha([("x", 1, "a"), ("y", 2, "b")]) is None
    assert alpha([("x", 1, "a"), ("y", 1, "b"), ("y", 2, "b"), ("x", 2, "a")]) < 0


def test_agreement_between_sets():
    one = {"a": ("sad", "afraid"), "b": ("joyful",), "c": (), "d": ("sad",)}
    two = {"a": ("afraid", "sad"), "b": ("joyful", "grateful"), "c": ()}
    result = label_agreement({"one": one, "two": two})
    (pair,) = result["pairs"]
    assert (pair["names"], pair["conversations"]) == (["one", "two"], 3)
    assert pair["jaccard"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert pair["same"] == pytest.approx(200 / 3)
    # Observed: MASI distance of {j} and {j, g} is 1 - 1/2 * 2/3 = 2/3, over six answers (d does not count) 2 * 2/3 / 6.
    # Expected: of the 30 ordered pairs of different answers four are alike; {j}-{j, g} is 2/3, all others 1.
    assert pair["alpha"] == pytest.approx(1 - (4 / 18) / ((30 - 4 - 2 + 2 * 2 / 3) / 30), abs=1e-3)
    assert result["alpha"] == pair["alpha"]
    assert result["emotions_per_sample"] == {"one": 1.0, "two": 4 / 3}


def test_agreement_needs_two_that_share_something():
    with pytest.raises(InputError, match="at least two"):
        label_agreement({"one": {"a": ()}})
    with pytest.raises(InputError, match="one and two share no conversation"):
        label_agreement({"one": {"a": ()}, "two": {"b": ()}})


# the command


def command(*words):
    parser = argparse.ArgumentParser()
    declare_annotate(parser)
    return run_annotate(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotate") / "corpus"
    folder.mkdir()
    said = {
        "sad": ("I was sad and afraid.", "Be grateful."),
        "joyful": ("We won, so joyful!", "You must be grateful."),
        "afraid": ("A noise.", "Oh."),
        "grateful": ("Thanks.",),
    }
    for split in ("train", "valid", "test"):
        records = [
            {
                "conv_id": f"{split}-{emotion}",
                "emotion": emotion,
                "situation": "S.",
                "utterances": [
                    {"speaker": ("speaker", "listener")[i % 2], "text": x} for i, x in enumerate(turns)
                ],
            }
            for emotion, turns in said.items()
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_the_whole_way(corpus, tmp_path, capsys):
    out, multi = tmp_path / "out", tmp_path / "multi.jsonl"
    assert command("run", "--data", corpus, "--annotator", "lexicon", "--out", out) == 0
    assert "the true one among them            2" in capsys.readouterr().out
    sheet = out / "review.csv"
    copy = tmp_path / "other.csv"
    copy.write_bytes(sheet.read_bytes())
    edit(sheet, "sad,afraid,", "sad,afraid,x")
    assert command("review", out, "--out", multi) == 0
    assert read_multi_emotion(multi) == {
        "test-sad": ("sad", "grateful"),
        "test-joyful": ("joyful", "grateful"),
    }
    assert "1 of 3 labels struck" in capsys.readouterr().out
    assert command("review", out, "--sheet", sheet, copy, "--out", multi) == 0
    assert "Krippendorff's alpha 0.000" in capsys.readouterr().out
    again = tmp_path / "again"
    files = [out / "annotations.jsonl", multi]
    assert command("run", "--data", corpus, "--annotator", "file", "--labels", *files, "--out", again) == 0
    assert "1 dialogues without an annotation, test-afraid first" in capsys.readouterr().out
    assert command("agreement", *files) == 0
    assert "        2" in capsys.readouterr().out


def test_a_prepared_folder_gives_the_same_conversations(corpus, tmp_path):
    prepare(corpus, tmp_path / "prepared", progress=False)
    assert read_conversations(tmp_path / "prepared", "test") == read_conversations(corpus, "test")
    conversations, emotions = read_conversations(corpus, "valid")
    assert emotions == EMOTIONS
    assert [c.conv_id for c in conversations] == ["valid-sad", "valid-joyful", "valid-afraid"]
    texts = tmp_path / "prepared" / "test.texts.jsonl"
    texts.write_text(texts.read_text() + texts.read_text())
    with pytest.raises(
        InputError, match=r"prepared: damaged: its arrays or texts are not those that were prepared"
    ):
        read_conversations(tmp_path / "prepared", "test")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--annotator", "endpoint", "--model", "m"], "--url: is needed for --annotator endpoint"),
        (["--annotator", "file"], "--labels: is needed for --annotator file"),
        (["--annotator", "lexicon", "--url", "http://x"], "--url: goes with --annotator endpoint"),
        (["--annotator", "lexicon", "--limit", "0"], "--limit"),
    ],
)
def test_flags_that_do_not_fit(corpus, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        command("run", "--data", corpus, "--out", tmp_path / "o", *flags)


def test_the_same_file_twice(tmp_path):
    path = labels_file(tmp_path / "1", a=["sad"])
    with pytest.raises(InputError, match="the same file twice"):
        command("agreement", path, path)


def test_all_struck_is_no_subset(tmp_path):
    run(FOUR, Says(**SAID), tmp_path, progress=False)
    text = (tmp_path / "review.csv").read_text(encoding="utf-8-sig")
    (tmp_path / "review.csv").write_text(text.replace(",\n", ",x\n").replace(",\r\n", ",x\r\n"))
    with pytest.raises(InputError, match="every label was struck"):
        command("review", tmp_path, "--out", tmp_path / "multi.jsonl")
    assert not (tmp_path / "multi.jsonl").exists()
