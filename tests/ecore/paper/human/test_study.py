"""Human evaluation: sheets that tell raters nothing and spreadsheets cannot break, and scores that only whole,
untouched sheets give."""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from scipy.stats import spearmanr

from ecore.cli.human import declare_human, run_human
from ecore.errors import InputError
from ecore.paper.human.sheets import ASPECTS, COLUMNS, KINDS
from ecore.paper.human.study import export, fleiss_kappa, format_scores, score, spearman

SYSTEMS = ("Alpha", "Bravo", "Charly")
CONTEXTS = 12
NASTY = (
    "</script><script>alert(1)</script>", '<img src=x onerror="alert(2)">', '=HYPERLINK("http://x";"y")', "+1;=1+1",
    '-2, "=3" | @x', "@SUM(1)", "\t=1", "one\ntwo\r\nthree\u2028four", "nul\x00 bell\x07", "nel \x85 end",
    "naïve “é” &amp;", "5-10",
)  # fmt: skip


def answer(system: str, i: int) -> str:
    """Bravo says what Alpha says to context 3, Charly what Bravo says to context 5."""
    if (system, i) == ("Bravo", 3):
        return answer("Alpha", 3)
    if (system, i) == ("Charly", 5):
        return answer("Bravo", 5)
    return f"{NASTY[(i + SYSTEMS.index(system)) % len(NASTY)]} {SYSTEMS.index(system) * 100 + i}"


def record(system: str, i: int) -> dict:
    turns = [f"{NASTY[i]} begins {i}", "Oh?", f"Yes {i}."]
    said = {"prediction": answer(system, i), "reference": "r"}
    return {"conv_id": f"c{i}", "turn": 3, "context": turns, **said}


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("predictions")
    return {s: write(folder / f"{s}.jsonl", [record(s, i) for i in range(CONTEXTS)]) for s in SYSTEMS}


@pytest.fixture(scope="module")
def study(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    export(files, out, contexts=CONTEXTS)
    return out


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def sheet_path(study: Path, kind: str, rater: int) -> Path:
    return study / f"rater-{rater}" / f"{kind}-{rater}.csv"


def plain(text: str) -> str:
    """What tells a text from the others, whatever a sheet does to it: its closing number."""
    return re.findall(r"\d+", text)[-1]


def rated(rater: int, number: str) -> list[int]:
    return [
        int(hashlib.md5(f"{a} {number} {rater if a else 0}".encode()).hexdigest(), 16) % 5 + 1
        for a in range(3)
    ]


def chosen(rater: int, a: str, b: str) -> str:
    """Some ties, and mostly the response with the lower number."""
    total = int(a) + int(b) + rater
    if total % 4 == 0:
        return "tie"
    return "A" if (int(a) < int(b)) != (total % 5 == 0) else "B"


def fill(study: Path, kind: str, rater: int) -> list[list[str]]:
    header, *rows = rows_of(sheet_path(study, kind, rater))
    for row in rows:
        numbers = [plain(cell) for cell in row[2 : header.index("choice" if kind == "ab" else "fluency")]]
        given = [chosen(rater, *numbers)] if kind == "ab" else rated(rater, *numbers)
        row[-len(given) :] = map(str, given)
    return [header, *rows]


def save(path: Path, rows: list[list[str]]) -> Path:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def finished(study: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("finished")
    names = [(kind, rater) for kind in KINDS for rater in (1, 2, 3)]
    return {f"{k}-{r}": save(folder / f"{k}-{r}.csv", fill(study, k, r)) for k, r in names}


def test_raters_learn_no_system(study: Path) -> None:
    sheets = [path for path in study.rglob("*") if path.is_file() and path.name != "key.json"]
    assert sorted(str(path.relative_to(study)) for path in sheets) == [
        f"rater-{r}/{k}-{r}.{e}" for r in (1, 2, 3) for k in ("ab", "rating") for e in ("csv", "html")
    ]
    for path in sheets:
        assert not any(
            name.lower() in path.read_text(encoding="utf-8").lower() for name in (*SYSTEMS, "jsonl", "seed")
        )
    # No place tells the system: each stands at every place in some context, and at another for another rater.
    key = json.loads((study / "key.json").read_text())
    for name, sheet in key["sheets"].items():
        places: dict[str, set[int]] = {system: set() for system in SYSTEMS}
        last, place = None, 0
        for item in sheet["items"].values():
            place = place + 1 if item["context"] == last and sheet["kind"] == "rating" else 0
            last = item["context"]
            for side, systems in enumerate(item["systems"]):
                for system in systems:
                    places[system].add(place + side)
        assert all({0, 1} <= seen for seen in places.values()), name
    for kind in KINDS:
        items = [list(key["sheets"][f"{kind}-{rater}"]["items"].values()) for rater in (1, 2, 3)]
        for part in ("context", "systems"):
            assert len({str([item[part] for item in one]) for one in items}) == 3


def test_every_item_is_what_the_key_says(study: Path) -> None:
    key = json.loads((study / "key.json").read_text())
    for name, sheet in key["sheets"].items():
        _, *rows = rows_of(sheet_path(study, sheet["kind"], sheet["rater"]))
        assert [row[0] for row in rows] == list(sheet["items"])
        asked: list[tuple] = []
        alike: list[tuple]
        expected: list[tuple]
        for row, item in zip(rows, sheet["items"].values(), strict=True):
            i = item["context"] - 1
            assert f"begins {i} | Listener: Oh? | Speaker: Yes {i}." in row[1]
            for cell, systems in zip(row[2:], item["systems"], strict=False):
                assert {plain(cell)} == {plain(answer(system, i)) for system in systems}
            asked.append((i, *sorted(s for systems in item["systems"] for s in systems)))
        if sheet["kind"] == "rating":
            alike = [(3, "Alpha", "Bravo"), (5, "Bravo", "Charly")]
            alone = [(i, s) for i in range(CONTEXTS) for s in SYSTEMS]
            expected = alike + [one for one in alone if not any({*one} <= {*several} for several in alike)]
            contexts = [i for i, *_ in asked]
            assert contexts == sorted(
                contexts, key=contexts.index
            )  # the answers to one context stand together
        else:
            alike = [(3, *SYSTEMS), (5, *SYSTEMS)]
            expected = alike + [
                (i, "Alpha", s) for i in range(CONTEXTS) for s in SYSTEMS[1:] if i not in (3, 5)
            ]
        assert sorted(asked) == sorted(expected), name


def test_a_study_can_be_made_again(files: dict[str, Path], tmp_path: Path) -> None:
    for name, contexts, seed in (("a", 5, 0), ("b", 5, 0), ("c", 5, 1), ("d", 8, 0)):
        export(files, tmp_path / name, contexts=contexts, seed=seed)
    bytes_of = {n: {p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "abcd"}
    assert bytes_of["a"] == bytes_of["b"]
    drawn = {n: set(json.loads(bytes_of[n]["key.json"])["contexts"]) for n in "abcd"}
    assert len(drawn["a"]) == 5
    assert drawn["a"] != drawn["c"]
    assert drawn["a"] < drawn["d"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_no_cell_is_a_formula_whatever_the_delimiter(study: Path, delimiter: str) -> None:
    for path in study.rglob("*.csv"):
        assert path.read_bytes().startswith(b"\xef\xbb\xbf")
        text = path.read_text(encoding="utf-8-sig")
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
        for cell in re.split(rf"[{delimiter}\r\n]", text):  # as a program that knows nothing of quotes
            assert not re.match(r"[\"\s]*[=+\-@]", cell)
        for row in rows_of(path)[1:]:
            assert len(row) == len(rows_of(path)[0])
            assert all(re.match(r"(Speaker|Response): ", cell) for cell in row[1:] if cell)


def test_ratings(study: Path, finished: dict[str, Path]) -> None:
    rating = score(study, [finished[f"rating-{r}"] for r in (3, 1, 2)])["rating"]
    assert rating["raters"] == [1, 2, 3]
    for system in SYSTEMS:
        for aspect, name in enumerate(ASPECTS):
            values = [rated(r, plain(answer(system, i)))[aspect] for r in (1, 2, 3) for i in range(CONTEXTS)]
            got = rating["systems"][system][name]
            assert got == {
                "mean": pytest.approx(fmean(values)),
                "sd": pytest.approx(stdev(values)),
                "ratings": 36,
            }
    answers = sorted({(i, plain(answer(s, i))) for i in range(CONTEXTS) for s in SYSTEMS})
    assert len(answers) == 3 * CONTEXTS - 2
    assert [pair["raters"] for pair in rating["spearman"]["pairs"]] == [[1, 2], [1, 3], [2, 3]]
    found = []
    for pair in rating["spearman"]["pairs"]:
        for aspect, name in enumerate(ASPECTS):
            one, other = ([rated(r, number)[aspect] for _, number in answers] for r in pair["raters"])
            found.append(spearmanr(one, other).statistic)
            assert pair[name] == pytest.approx(found[-1])
        assert pair["fluency"] == pytest.approx(1)  # all raters give the same fluency
    mean = rating["spearman"]["mean"]
    assert mean["relevance"] == pytest.approx(fmean(found[1::3]))
    assert mean["all"] == pytest.approx(fmean(found))


def test_choices(study: Path, finished: dict[str, Path]) -> None:
    result = score(study, [finished[f"ab-{r}"] for r in (1, 2, 3)])
    assert "rating" not in result
    for pair, other in zip(result["ab"]["pairs"], SYSTEMS[1:], strict=True):
        same = 1 if other == "Bravo" else 0
        table = []
        for i in range(CONTEXTS):
            numbers = plain(answer("Alpha", i)), plain(answer(other, i))
            if numbers[0] != numbers[1]:
                said = [chosen(r, *numbers) for r in (1, 2, 3)]
                table.append([said.count(c) for c in ("A", "B", "tie")])
        wins, losses, ties = (sum(column) for column in zip(*table, strict=True))
        win, loss, tie = (100 * n / 36 for n in (wins, losses, ties + 3 * same))
        assert pair == {
            "first": "Alpha", "other": other, "win": pytest.approx(win), "loss": pytest.approx(loss),
            "tie": pytest.approx(tie), "choices": 36, "same_answer": same, "kappa": pytest.approx(fleiss_kappa(table)),
        }  # fmt: skip
        assert win > loss


def test_agreement_of_known_examples() -> None:
    # The worked example of Fleiss' kappa: 14 raters put 10 items in 5 categories.
    counts = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(counts) == pytest.approx(0.20993, abs=1e-5)
    assert fleiss_kappa([[3, 0, 0], [0, 3, 0]]) == 1
    for undefined in ([], [[1, 0, 0], [0, 1, 0]], [[3, 0, 0], [3, 0, 0]]):
        assert fleiss_kappa(undefined) is None
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.820783)
    assert spearman([3, 3, 3], [1, 2, 3]) is None


def test_one_rater_needs_no_scipy_and_two_do(
    study: Path, finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    result = score(study, [finished["rating-2"], finished["ab-1"]])
    assert result["rating"]["spearman"] == {"pairs": [], "mean": {**dict.fromkeys(ASPECTS), "all": None}}
    assert {pair["kappa"] for pair in result["ab"]["pairs"]} == {None}
    assert "raters" not in format_scores(result)
    with pytest.raises(InputError, match=r"scipy.*pip install 'ecore\[experiments\]'"):
        score(study, [finished["rating-1"], finished["rating-2"]])


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
    ("rating-1", lambda rows: [*rows, rows[7]], ":36: rating-1-007: the item stands on line 8 already"),
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
        with pytest.raises(InputError, match=r"key\.json: expected the key of a study"):
            score(tmp_path, [finished["ab-1"]])
    with pytest.raises(InputError, match="at least one finished sheet"):
        score(study, [])


def without(*names: str) -> Callable[[dict], dict]:
    return lambda record: {k: v for k, v in record.items() if k not in names}


def test_contexts_are_matched(tmp_path: Path) -> None:
    """By ids, or else by text; the context may stand in any of the files."""
    good = [record("Alpha", i) for i in range(4)]
    a = write(tmp_path / "a.jsonl", [without("context")(r) for r in good])
    b = write(tmp_path / "b.jsonl", [{**r, "turn": "3", "prediction": "b"} for r in good])
    spaced = [{**r, "prediction": "c", "context": [f" {turn} " for turn in r["context"]]} for r in good]
    c = write(tmp_path / "c.jsonl", [without("turn")(r) for r in spaced])
    export({"A": a, "B": b}, tmp_path / "ab", contexts=4, raters=1)
    assert "Yes 2." in (tmp_path / "ab/rater-1/ab-1.csv").read_text(encoding="utf-8-sig")
    export({"B": b, "C": c}, tmp_path / "bc", contexts=4, raters=1)
    with pytest.raises(
        InputError, match=r"c\.jsonl:1: neither 'conv_id' and 'turn' nor 'context' .*a\.jsonl:1"
    ):
        export({"A": a, "C": c}, tmp_path / "ac", contexts=4)
    with pytest.raises(InputError, match=r"a\.jsonl:1: no 'context'"):
        export({"A": a}, tmp_path / "x", contexts=4, kind="rating")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: [r[0], r[1], r[3], r[2]], r"b\.jsonl:5: another conv_id and turn than .*a\.jsonl:3"),
        (lambda r: [*r[:3], {**r[3], "turn": 5}], r"b\.jsonl:6: another conv_id and turn than .*a\.jsonl:4"),
        (
            lambda r: [*r[:3], {**without("conv_id")(r[3]), "context": ["No."]}],
            r"b\.jsonl:6: another context than",
        ),
        (lambda r: r[:3], r"b\.jsonl:5: the last of 3 samples, expected 4"),
        (lambda r: [*r, record("Alpha", 5)], r"a\.jsonl:4: the last of 4 samples, expected 5"),
        (
            lambda r: [{**without("turn")(r[0]), "context": []}, *r[1:]],
            r"b\.jsonl:3: expected 'context' to be a list",
        ),
        (
            lambda r: [{**without("turn")(r[0]), "context": ["a", 1]}, *r[1:]],
            r"b\.jsonl:3: expected 'context'",
        ),
        (lambda r: [without("prediction")(r[0]), *r[1:]], r"b\.jsonl:3: expected 'prediction'"),
    ],
)
def test_other_contexts_are_refused_by_line(tmp_path: Path, change: Callable, message: str) -> None:
    good = [record("Alpha", i) for i in range(4)]
    a, b = write(tmp_path / "a.jsonl", good), write(tmp_path / "b.jsonl", change(good))
    b.write_text("\n\n" + b.read_text())  # blank lines count as lines
    with pytest.raises(InputError, match=message):
        export({"A": a, "B": b}, tmp_path / "out", contexts=2)
    assert not (tmp_path / "out").exists()


def test_export_refuses(files: dict[str, Path], study: Path, tmp_path: Path) -> None:
    one = {"Alpha": files["Alpha"]}
    for systems, options, message in (
        (files, {"contexts": 13}, "at most the 12 of the files, got 13"),
        (files, {"contexts": 0}, "contexts: expected at least 1"),
        (files, {"raters": 0}, "raters: expected at least 1"),
        (files, {"kind": "all"}, "kind: expected rating, ab or both"),
        (one, {}, "both needs two systems"),
        ({**one, "Again": files["Alpha"]}, {"contexts": 3}, "nothing to choose"),
    ):
        with pytest.raises(InputError, match=message):
            export(systems, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"holds a study already"):
        export(files, study, contexts=3)


class Page(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles by element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = [("", {})]
        self.texts: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(("", {}))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.elements[-1]
        if tag in ("script", "style"):
            name = attributes.get("id", tag)
            self.texts[name] = self.texts.get(name, "") + data


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_holds_texts_as_data_only(study: Path, kind: str) -> None:
    path = sheet_path(study, kind, 1).with_suffix(".html")
    page, source = Page(path), path.read_text(encoding="utf-8")
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not any(
        {"src", "href", "onclick", "style", "action"} & attributes.keys() for _, attributes in page.elements
    )
    assert "<img" not in source
    assert "innerHTML" not in source
    assert "http" not in source.replace("http-equiv", "").replace(page.texts["study"], "")
    data = json.loads(page.texts["study"])
    _, *rows = rows_of(sheet_path(study, kind, 1))
    assert [row["cells"] for row in data["rows"]] == [
        r[: len(COLUMNS[kind]) - len(data["questions"])] for r in rows
    ]
    assert any("</script>" in turn for row in data["rows"] for _, turn in row["turns"])
    assert sorted(i for screen in data["screens"] for i in screen) == list(range(len(rows)))
    # The policy names every script and style by its hash: a browser runs nothing else.
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("logic", "view", "style"):
        digest = base64.b64encode(hashlib.sha256(page.texts[name].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


SCRIPT = """
const [data, logic] = JSON.parse(require("fs").readFileSync(0, "utf8"));
const createSheet = new Function(logic + "; return createSheet;")();
const kept = {};
const storage = { getItem: (k) => kept[k] ?? null, setItem: (k, v) => { kept[k] = v; } };
const study = JSON.parse(data), told = [];
let sheet = createSheet(study, storage);
told.push(sheet.open().length === sheet.total, sheet.csv());
study.rows.forEach((_, row) => study.questions.forEach(([question, values], i) => {
  if (row === 3) sheet = createSheet(study, storage);  // the page was closed and opened again
  sheet.set(row, question, values[(row + i) % values.length]);
}));
told.push(sheet.open().length, sheet.csv());
kept[Object.keys(kept)[0]] = JSON.stringify([{ fluency: "9", choice: "C" }, null]);
told.push(createSheet(study, storage).open().length === sheet.total);
kept[Object.keys(kept)[0]] = "torn {";
told.push(createSheet(study, storage).open().length === sheet.total);
const full = { getItem() { throw new Error(); }, setItem() { throw new Error(); } };
told.push(createSheet(study, full).set(0, study.questions[0][0], study.questions[0][1][0]));
told.push(createSheet(study, null).set(0, study.questions[0][0], study.questions[0][1][0]));
console.log(JSON.stringify(told));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_saves_the_sheet_that_score_reads(study: Path, tmp_path: Path, kind: str) -> None:
    path = sheet_path(study, kind, 2)
    texts = Page(path.with_suffix(".html")).texts
    given = json.dumps([texts["study"], texts["logic"]])
    done = subprocess.run(
        ["node", "-e", SCRIPT], input=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    none, empty, left, full, bad, torn, forbidden, missing = json.loads(done.stdout)
    assert empty.encode() == path.read_bytes()
    assert (none, left, bad, torn, forbidden, missing) == (True, 0, True, True, False, False)
    (tmp_path / "s.csv").write_bytes(full.encode())
    answers = [row[-1] for row in rows_of(tmp_path / "s.csv")[1:]]
    values = ("A", "B", "tie") if kind == "ab" else ("3", "4", "5", "1", "2")
    assert answers == [values[i % len(values)] for i in range(len(answers))]
    assert score(study, [tmp_path / "s.csv"])[kind]["raters"] == [2]


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    declare_human(parser)
    return run_human(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    systems = [f"{name}={path}" for name, path in files.items()]
    out = tmp_path / "study"
    assert command("export", *systems, "--out", out, "--contexts", 6, "--raters", 2, "--seed", 4) == 0
    assert "raters 2" in capsys.readouterr().out
    sheets = [save(tmp_path / f"{k}-{r}.csv", fill(out, k, r)) for k in KINDS for r in (1, 2)]
    assert command("score", out, *sheets) == 0
    table = capsys.readouterr().out
    result = json.loads((out / "scores.json").read_text())
    assert result == score(out, sheets)
    relevance, pair = result["rating"]["systems"]["Bravo"]["relevance"], result["ab"]["pairs"][1]
    bravo = next(line for line in table.splitlines() if line.startswith("Bravo"))
    assert f"{relevance['mean']:.2f} ± {relevance['sd']:.2f}" in bravo
    charly = [line for line in table.splitlines() if line.startswith("Charly")][1].split()
    told = [f"{pair[outcome]:.1f}" for outcome in ("win", "loss", "tie")]
    assert charly == ["Charly", *told, "12", str(pair["same_answer"]), f"{pair['kappa']:.2f}"]
    assert command("score", out, *sheets[:1], "--out", tmp_path / "s.json") == 0
    assert json.loads((tmp_path / "s.json").read_text())["rating"]["raters"] == [1]
    for kept in (out / "key.json", sheets[0]):
        before = kept.read_bytes()
        with pytest.raises(InputError, match="would overwrite what it is made from"):
            command("score", out, *sheets, "--out", kept)
        assert kept.read_bytes() == before
    with pytest.raises(InputError, match=r"s\.json: exists already"):
        command("export", *systems, "--out", tmp_path / "s.json")


@pytest.mark.parametrize(
    "given, message",
    [
        (["Alpha"], "Alpha: expected SYSTEM=FILE"),
        (["=a.jsonl"], "expected SYSTEM=FILE"),
        (["A="], "expected SYSTEM=FILE"),
        (["A=a.jsonl", "A=b.jsonl"], "A=b.jsonl: the name A is taken already"),
        (["A=none.jsonl", "B=b.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_the_command_refuses(tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command("export", *given, "--out", tmp_path / "study")
