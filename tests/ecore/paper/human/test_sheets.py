"""Sheets as they come back: what spreadsheets do is accepted, what raters must not do is refused by line."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ecore.errors import InputError
from ecore.paper.human.study import export, score
from tests.ecore.paper.human.raters import fill, record, rows_of, save, write


def dialect(rows: list[list[str]], encoding: str = "utf-8", **options: Any) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, **options).writerows(rows)
    return out.getvalue().encode(encoding)


WAYS: dict[str, Callable[[list[list[str]]], bytes]] = {
    "semicolons, Unix": lambda rows: dialect(rows, delimiter=";", lineterminator="\n"),
    "tabs in UTF-16": lambda rows: dialect(rows, "utf-16", delimiter="\t"),
    "old Mac": lambda rows: dialect(rows, lineterminator="\r"),
    "all quoted, BOM": lambda rows: dialect(rows, "utf-8-sig", quoting=csv.QUOTE_ALL),
    "sorted": lambda rows: dialect([rows[0], *sorted(rows[1:], key=lambda row: row[1:])]),
    "blank lines and columns": lambda rows: dialect([[*row, "", ""] for row in rows] + [[], ["", "", ""]]),
    "blank lines above": lambda rows: dialect([[], ["", ""], *rows]),
    "decimals": lambda rows: dialect([[re.sub(r"^([1-5])$", r"\1,0", cell) for cell in row] for row in rows]),
    "lower case": lambda rows: dialect([rows[0], *([*row[:-1], f" {row[-1].lower()} "] for row in rows[1:])]),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_spreadsheets_do_is_accepted(
    study: Path, finished: dict[str, Path], tmp_path: Path, way: str
) -> None:
    for name in ("rating-1", "ab-2"):
        (tmp_path / "s.csv").write_bytes(WAYS[way](rows_of(finished[name])))
        assert score(study, [tmp_path / "s.csv"]) == score(study, [finished[name]])


def test_windows_1252_is_accepted_where_it_loses_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    records = [{**record("Alpha", i), "context": ["naïve “é”"], "prediction": f"é {i}"} for i in range(3)]
    export({"A": write(tmp_path / "a.jsonl", records)}, tmp_path / "s", contexts=3, raters=1, kind="rating")
    (tmp_path / "s.csv").write_bytes(dialect(fill(tmp_path / "s", "rating", 1), "cp1252"))
    assert score(tmp_path / "s", [tmp_path / "s.csv"])["rating"]["systems"]["A"]["fluency"]["ratings"] == 3
    (tmp_path / "s.csv").write_bytes(dialect(fill(tmp_path / "s", "rating", 1), "mac-roman"))
    with pytest.raises(InputError, match=r"s\.csv:2: rating-1-001: context is not the text .*UTF-8"):
        score(tmp_path / "s", [tmp_path / "s.csv"])


def put(line: int, column: str, value: str) -> Callable[[list[list[str]]], list[list[str]]]:
    def change(rows: list[list[str]]) -> list[list[str]]:
        rows[line - 1][rows[0].index(column)] = value
        return rows

    return change


def append(cell: str) -> Callable[[list[list[str]]], list[list[str]]]:
    def change(rows: list[list[str]]) -> list[list[str]]:
        rows[6][rows[0].index(cell)] += "."
        return rows

    return change


REFUSED = [
    ("rating-1", put(4, "empathy", ""), ":4: rating-1-003: empathy is missing, expected one of 1, 2, 3, 4, 5"),
    ("rating-1", put(4, "empathy", "6"), ":4: rating-1-003: empathy is '6', expected one of"),
    ("rating-1", put(4, "fluency", "0"), ":4: rating-1-003: fluency is '0'"),
    ("rating-1", put(4, "fluency", "3.5"), ":4: rating-1-003: fluency is '3.5'"),
    ("rating-1", put(4, "fluency", "45"), ":4: rating-1-003: fluency is '45'"),
    ("ab-1", put(3, "choice", ""), ":3: ab-1-002: choice is missing, expected one of A, B, tie"),
    ("ab-1", put(3, "choice", "C"), ":3: ab-1-002: choice is 'C'"),
    ("rating-1", put(5, "item", "rating-1-900"), ":5: rating-1-900: unknown item"),
    ("rating-1", put(5, "item", "ab-1-001"), ":5: ab-1-001: unknown item, expected one of the study's rating items"),
    ("rating-1", put(5, "item", ""), ":5: : unknown item"),
    ("rating-1", put(5, "item", "rating-2-004"),
     ":5: rating-2-004: of sheet rating-2, expected one of sheet rating-1 as on line 2"),
    ("rating-1", lambda rows: [*rows, rows[7]], ":36: rating-1-007: the item is on line 8 already"),
    ("rating-1", lambda rows: rows[:9] + rows[10:], ": rating-1-009 missing, expected every item of sheet rating-1"),
    ("rating-1", lambda rows: rows[:-3], ": rating-1-032 and 2 more missing"),
    ("rating-1", lambda rows: rows[:1], ": no items in it"),
    ("rating-1", append("response"), ":7: rating-1-006: response is not the text that was exported"),
    ("ab-1", append("response_b"), ":7: ab-1-006: response_b is not the text that was exported"),
    ("ab-1", append("context"), ":7: ab-1-006: context is not the text that was exported"),
    ("rating-1", lambda rows: [rows[0], *([*r[:2], q[2], *r[3:]] for r, q in zip(rows[1:], rows[:0:-1], strict=True))],
     ":2: rating-1-001: response is not"),
    ("rating-1", put(1, "empathy", "Empathie"), ":1: expected the columns item, context"),
    ("rating-1", lambda rows: [[*row[:3], row[4], row[3], row[5]] for row in rows], ":1: expected the columns"),
    ("rating-1", lambda rows: rows[1:], ":1: expected the columns"),
    ("rating-1", lambda rows: [*rows[:4], [*rows[4], "note"], *rows[5:]], ":5: expected 6 columns, got 7"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, message", REFUSED)
def test_tampering_is_refused_by_line(
    study: Path, finished: dict[str, Path], tmp_path: Path, name: str, change: Callable, message: str
) -> None:
    path = save(tmp_path / "changed.csv", change(rows_of(finished[name])))
    with pytest.raises(InputError) as error:
        score(study, [path])
    assert f"{path}{message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_torn_files_are_refused(study: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    whole = dialect(rows_of(finished["rating-1"]), quoting=csv.QUOTE_ALL)
    lines = whole.split(b"\r\n")
    for content, message in (
        (b"", ":1: expected the columns"),
        (whole.replace(b",", b"|"), ":1: expected the columns"),
        (b"\r\n".join([*lines[:3], lines[3] + b"x", *lines[4:]]), ":4: not valid CSV"),
        (whole[:-4], f":{len(lines) - 1}: not valid CSV"),  # an open quote
        (whole.decode().encode("utf-16-le"), ": not text in UTF-8"),
    ):
        (tmp_path / "s.csv").write_bytes(content)
        with pytest.raises(InputError) as error:
            score(study, [tmp_path / "s.csv"])
        assert f"s.csv{message}" in str(error.value)
    with pytest.raises(InputError, match=r"none\.csv: no such file"):
        score(study, [tmp_path / "none.csv"])


def test_one_sheet_twice(study: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    again = shutil.copy(finished["rating-1"], tmp_path / "rating-2.csv")
    with pytest.raises(
        InputError, match=r"rating-2\.csv:1: sheet rating-1 was read already, from .*rating-1\.csv"
    ):
        score(study, [finished["rating-1"], again])


def test_no_key(study: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"key\.json: no such file"):
        score(tmp_path, [finished["ab-1"]])
    for text in ("{}", '{"format": 1}', "[]"):
        (tmp_path / "key.json").write_text(text)
        with pytest.raises(InputError, match=r"key\.json: .*expected "):
            score(tmp_path, [finished["ab-1"]])
    with pytest.raises(InputError, match="at least one finished sheet"):
        score(study, [])


KEY_DAMAGE = {
    "a digit": lambda text: text.replace('"rater": 2', '"rater": 3', 1),
    **{
        name: lambda text, change=change: json.dumps(change(json.loads(text)))
        for name, change in {
            "systems is a list": lambda k: {**k, "systems": [*k["systems"]]},
            "no systems": lambda k: {**k, "systems": {}},
            "contexts is a number": lambda k: {**k, "contexts": 3},
            "another context": lambda k: {**k, "contexts": {**k["contexts"], "x": {}}},
            "sheets is null": lambda k: {**k, "sheets": None},
            "a sheet is text": lambda k: {**k, "sheets": {**k["sheets"], "ab-1": "x"}},
            "no kind": lambda k: {**k, "sheets": {**k["sheets"], "ab-1": {"rater": 1, "items": {}}}},
            "no items": lambda k: {
                **k,
                "sheets": {**k["sheets"], "ab-1": {**k["sheets"]["ab-1"], "items": {}}},
            },
            **{
                f"{part} is {value!r}": lambda k, part=part, value=value: _with_item(k, part, value)
                for part, value in (
                    *(("context", v) for v in (None, "1", 10**50, 1.0)),
                    *(("systems", v) for v in (None, "Alpha", [], [[]], [["Nobody"], ["Alpha"]], [[1], [2]])),
                    *(("sha256", v) for v in (None, [], ["x"] * 9)),
                )
            },
        }.items()
    },
}


def _with_item(key: dict, part: str, value: object) -> dict:
    items = key["sheets"]["ab-1"]["items"]
    items[next(iter(items))][part] = value
    return key


@pytest.mark.parametrize("name", KEY_DAMAGE)
def test_a_key_that_is_none(name: str, study: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    text = (study / "key.json").read_text()
    (tmp_path / "key.json").write_text(KEY_DAMAGE[name](text))
    with pytest.raises(InputError, match=r"key\.json: .*(expected |damaged)"):
        score(tmp_path, [finished["ab-1"], finished["rating-1"]])
    (tmp_path / "key.json").write_text(
        json.dumps({k: v for k, v in json.loads(text).items() if k != "checksum"})
    )
    assert score(tmp_path, [finished["ab-1"]]) == score(study, [finished["ab-1"]])  # as older ones
