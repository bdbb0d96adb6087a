"""The sheet that reviewers strike labels in: it comes back whatever a spreadsheet does to it."""

import csv

import pytest

from ecore.errors import InputError
from ecore.evaluation.multi_emotion import write_labels
from ecore.paper.annotation.annotators import FileAnnotator
from ecore.paper.annotation.pipeline import run
from ecore.paper.annotation.review import read_sheet, refuse_marked, strike, write_sheet
from tests.ecore.paper.annotation.commands import command, edit
from tests.ecore.paper.annotation.dialogues import EMOTIONS, FOUR, Says, conversation, labels_file

LABELS = {"a": ("sad", "joyful", "afraid"), "c": ("joyful", "grateful")}


@pytest.fixture
def sheet(tmp_path):
    path = tmp_path / "review.csv"
    write_sheet(path, FOUR, LABELS)
    return path


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
def test_damage_is_reported_by_line(sheet, old, new, line, message):
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
