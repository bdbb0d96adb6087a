"""A study: its sheets tell raters nothing, and its scores are what the raters said."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
from scipy.stats import spearmanr

from ecore.errors import InputError
from ecore.paper.human.scores import fleiss_kappa, spearman
from ecore.paper.human.sheets import ASPECTS, KINDS
from ecore.paper.human.study import export, format_scores, score
from tests.ecore.paper.human.raters import (
    CONTEXTS,
    SYSTEMS,
    answer,
    chosen,
    plain,
    rated,
    rows_of,
    sheet_path,
)


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
