"""The page of a study: it holds texts as data only, and saves the sheet that is scored."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ecore.paper.human.sheets import COLUMNS, KINDS
from ecore.paper.human.study import score
from tests.ecore.paper.human.raters import rows_of, sheet_path


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
const study = JSON.parse(data), seen = [];
let sheet = createSheet(study, storage);
seen.push(sheet.open().length === sheet.total, sheet.csv());
study.rows.forEach((_, row) => study.questions.forEach(([question, values], i) => {
  if (row === 3) sheet = createSheet(study, storage);  // the page was closed and opened again
  sheet.set(row, question, values[(row + i) % values.length]);
}));
seen.push(sheet.open().length, sheet.csv());
kept[Object.keys(kept)[0]] = JSON.stringify([{ fluency: "9", choice: "C" }, null]);
seen.push(createSheet(study, storage).open().length === sheet.total);
kept[Object.keys(kept)[0]] = "torn {";
seen.push(createSheet(study, storage).open().length === sheet.total);
const full = { getItem() { throw new Error(); }, setItem() { throw new Error(); } };
seen.push(createSheet(study, full).set(0, study.questions[0][0], study.questions[0][1][0]));
seen.push(createSheet(study, null).set(0, study.questions[0][0], study.questions[0][1][0]));
console.log(JSON.stringify(seen));
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
