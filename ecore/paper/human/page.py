"""A rater's sheet as a page for the browser: one file that loads nothing else and saves the finished CSV sheet."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ecore.files import atomic_path
from ecore.paper.human.sheets import COLUMNS, QUESTIONS, Item, speaker

_TITLES = {"rating": "Rate the responses", "ab": "Choose the better response"}
_KEYS = {
    "rating": "<kbd>1</kbd> to <kbd>5</kbd> answer the marked question and go to the next",
    "ab": "<kbd>A</kbd>, <kbd>B</kbd> and <kbd>T</kbd> (tie) answer",
}
# The definitions of Appendix I, in our own words.
_GUIDELINES = {
    "rating": """
<p>You read a dialogue and one or more possible responses to its last turn. Give every response a whole number from 1
to 5 for each of three aspects, and judge each aspect by itself. 2 and 4 are for when you waver between their
neighbours.</p>
<table>
<tr><th scope="col"></th><th scope="col">5</th><th scope="col">3</th><th scope="col">1</th></tr>
<tr><th scope="row">Fluency</th><td>Could have been written by a person: correct, smooth, understood at once.</td>
<td>Some mistakes in the language, but you can follow it.</td><td>Full of mistakes and hard to make out.</td></tr>
<tr><th scope="row">Relevance</th><td>Fits this dialogue perfectly.</td><td>Has something to do with this dialogue.</td>
<td>Has nothing to do with this dialogue.</td></tr>
<tr><th scope="row">Empathy</th><td>Rich in feeling, and in just the feelings that this dialogue calls for.</td>
<td>Shows some feeling, which suits this dialogue in part.</td><td>Shows no feeling, or the wrong one.</td></tr>
</table>""",
    "ab": """
<p>You read a dialogue and two possible responses to its last turn. Choose the one that you find the better answer to
this person, all in all: how it is written, how well it fits, how much it feels with them. Choose a tie where both are
equally good or equally bad.</p>""",
}


def write_page(path: Path, kind: str, study: str, sheet: str, rater: int, items: Sequence[Item]) -> None:
    """Write the page of a sheet, which saves what :func:`~ecore.paper.human.sheets.write_sheet` writes, filled.

    It holds texts as JSON and shows them as text, never as markup; its content security policy lets no script run
    but its own, and no request leave.

    Args:
        study: identifies this study's answers in the browser's storage.
        sheet: the sheet's name, from which that of the saved file is made.
    """
    rows = [
        {
            "turns": [[speaker(i), turn] for i, turn in enumerate(item.turns)],
            "responses": item.responses,
            "cells": [item.id, *item.cells()],
        }
        for item in items
    ]
    # A dialogue and all its responses are rated on one screen; choices are made one by one.
    together = (lambda row: rows[row]["turns"]) if kind == "rating" else None
    data = {
        "study": study,
        "sheet": sheet,
        "columns": COLUMNS[kind],
        "questions": list(QUESTIONS[kind].items()),
        "rows": rows,
        "screens": [list(group) for _, group in groupby(range(len(rows)), together)],
    }
    # Nothing in the data may end the script element that holds it.
    embedded = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    policy = (
        f"default-src 'none'; script-src {_source(_LOGIC)} {_source(_VIEW)}; style-src {_source(_STYLE)}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy, quote=True)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_TITLES[kind]}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{_TITLES[kind]}</h1>
<details open>
<summary>What to do</summary>
{_GUIDELINES[kind].strip()}
<p>Keys: {_KEYS[kind]}; <kbd>Enter</kbd> goes to the next dialogue, <kbd>Backspace</kbd> to the one before. Answers are
kept in this browser: you can close the page and go on later on the same computer. When everything is answered, <b>Save
the sheet</b> makes the file {sheet}.csv: send it back. The page itself sends nothing.</p>
</details>
</header>
<noscript><p>This page needs JavaScript. Without it, fill {sheet}.csv in a spreadsheet program.</p></noscript>
<main id="screen"></main>
<footer>
<button id="previous" type="button">Previous</button>
<button id="next" type="button">Next</button>
<button id="open" type="button">First open question</button>
<progress id="progress" aria-label="Answered"></progress>
<span id="status" role="status"></span>
<button id="save" type="button">Save the sheet</button>
<small>Rater {rater}</small>
</footer>
<script type="application/json" id="study">{embedded}</script>
<script id="logic">{_LOGIC}</script>
<script id="view">{_VIEW}</script>
</body>
</html>
"""
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _source(text: str) -> str:
    """The policy's name for an inline script or style of this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 25%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 0 1rem 7rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border: 1px solid var(--line); padding: .3rem .5rem; text-align: left; vertical-align: top; }
kbd { border: 1px solid var(--line); border-radius: 3px; padding: 0 .3em; }
.turn, .response { overflow-wrap: anywhere; unicode-bidi: isolate; margin: .4rem 0; }
.turn b { opacity: .7; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; margin: 1rem 0; }
.response { font-size: 1.15rem; }
fieldset { border: 0; border-left: 4px solid transparent; margin: .2rem 0; padding: .2rem .6rem; }
fieldset.current { border-color: #1a6fd4; }
legend { float: left; width: 6.5rem; font-weight: 600; }
label { margin-right: 1.2rem; cursor: pointer; white-space: nowrap; }
input { width: 1.1rem; height: 1.1rem; vertical-align: -.15rem; }
footer { position: fixed; inset: auto 0 0 0; display: flex; flex-wrap: wrap; gap: .4rem .6rem; align-items: center;
  justify-content: center; padding: .5rem; background: Canvas; border-top: 1px solid var(--line); }
button { font: inherit; padding: .25rem .8rem; }
@media (max-width: 30rem) { legend { float: none; } label { margin-right: .8rem; } }
"""

# What was answered, and the CSV of it. Knows no document; `storage` is the browser's, or null where it gives none.
_LOGIC = r"""
"use strict";
function createSheet(study, storage) {
  const place = `ecore-human/${study.study}/${study.sheet}`;
  const questions = study.questions.map(([question]) => question);
  const answers = study.rows.map(() => ({}));
  let kept = [];
  try { kept = JSON.parse(storage.getItem(place)) || []; } catch { /* none, or not ours */ }
  answers.forEach((given, row) => study.questions.forEach(([question, allowed]) => {
    const value = (kept[row] || {})[question];
    if (allowed.includes(value)) given[question] = value;
  }));
  const quoted = (cell) => `"${cell.replaceAll('"', '""')}"`;
  return {
    total: answers.length * questions.length,
    get: (row, question) => answers[row][question],
    // Returns whether the answer will be there when the page is opened again.
    set(row, question, value) {
      answers[row][question] = value;
      try { storage.setItem(place, JSON.stringify(answers)); return true; } catch { return false; }
    },
    // [row, question] of each one without an answer, in order.
    open: () => answers.flatMap((given, row) =>
      questions.filter((question) => !(question in given)).map((question) => [row, question])),
    // Byte order mark, quotes and line ends as in the empty sheet that comes with the page.
    csv: () => "\ufeff" + [study.columns, ...study.rows.map(({ cells }, row) =>
      [...cells, ...questions.map((question) => answers[row][question] || "")])]
      .map((cells) => cells.map(quoted).join(",") + "\r\n").join(""),
  };
}
"""

_VIEW = r"""
"use strict";
{
  const $ = (id) => document.getElementById(id);
  const study = JSON.parse($("study").textContent);
  let storage = null;
  try { storage = window.localStorage; } catch { /* the browser forbids it */ }
  const sheet = createSheet(study, storage);
  let screen = 0, current = 0, groups = [], safe = true;

  function make(name, properties, ...children) {
    const node = Object.assign(document.createElement(name), properties);
    node.append(...children);
    return node;
  }

  function ask(row, [question, values]) {
    const index = groups.length;
    const group = make("fieldset", {}, make("legend", {}, question[0].toUpperCase() + question.slice(1)),
      ...values.map((value) => make("label", {}, make("input", {
        type: "radio", name: `${row}-${question}`, value, checked: sheet.get(row, question) === value,
        onchange: () => answer(row, question, value),
      }), " " + value)));
    group.addEventListener("focusin", () => mark(index));
    groups.push({ group, row, question, values });
    return group;
  }

  function show(number) {
    screen = Math.max(0, Math.min(number, study.screens.length - 1));
    groups = [];
    const rows = study.screens[screen];
    const cards = rows.map((row) => {
      const { responses } = study.rows[row];
      const texts = responses.map((text, i) => make("p", { className: "response", dir: "auto" },
        ...(responses.length > 1 ? [make("b", {}, "AB"[i] + ": ")] : []), text));
      return make("section", { className: "card" }, ...texts, ...study.questions.map((entry) => ask(row, entry)));
    });
    $("screen").replaceChildren(
      make("h2", {}, `Dialogue ${screen + 1} of ${study.screens.length}`),
      ...study.rows[rows[0]].turns.map(([who, text]) =>
        make("p", { className: "turn", dir: "auto" }, make("b", {}, who + ": "), text)),
      ...cards);
    mark(Math.max(0, groups.findIndex(({ row, question }) => !sheet.get(row, question))));
    $("previous").disabled = screen === 0;
    $("next").disabled = screen === study.screens.length - 1;
    tell();
  }

  function mark(index) {
    current = index;
    groups.forEach(({ group }, i) => group.classList.toggle("current", i === index));
  }

  function focus(options) {
    const { group } = groups[current];
    (group.querySelector("input:checked") || group.querySelector("input")).focus(options);
  }

  function tell(more = "") {
    const left = sheet.open().length;
    $("progress").max = sheet.total;
    $("progress").value = sheet.total - left;
    $("open").disabled = left === 0;
    $("status").textContent = `${sheet.total - left} of ${sheet.total} answered. ${more}` +
      (safe ? "" : "This browser keeps no answers: leave the page open until you have saved the sheet.");
  }

  function answer(row, question, value) {
    safe = sheet.set(row, question, value) && safe;
    tell();
  }

  function choose(value) {
    const { group, row, question, values } = groups[current];
    if (!values.includes(value)) return false;
    group.querySelector(`input[value="${value}"]`).checked = true;
    answer(row, question, value);
    mark(Math.min(current + 1, groups.length - 1));
    focus();
    return true;
  }

  function turn(step) {
    show(screen + step);
    focus({ preventScroll: true });
    window.scrollTo(0, $("screen").offsetTop);
  }

  function toOpen() {
    const [first] = sheet.open();
    if (first) turn(study.screens.findIndex((rows) => rows.includes(first[0])) - screen);
  }

  function save() {
    const left = sheet.open().length;
    if (left) {
      toOpen();
      tell(`${left} still to answer before the sheet can be saved. `);
      return;
    }
    const href = URL.createObjectURL(new Blob([sheet.csv()], { type: "text/csv" }));
    make("a", { href, download: `${study.sheet}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60000);
    safe = true;
    tell(`${study.sheet}.csv is among your downloads: please send it back. `);
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const control = /^(BUTTON|SUMMARY)$/.test(event.target.tagName);
    if (event.key === "Enter" && !control) turn(1);
    else if (event.key === "Backspace") turn(-1);
    else if (!choose({ a: "A", b: "B", t: "tie" }[event.key.toLowerCase()] || event.key)) return;
    event.preventDefault();
  });
  window.addEventListener("beforeunload", (event) => { if (!safe) event.preventDefault(); });
  $("previous").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  $("open").onclick = toOpen;
  $("save").onclick = save;
  show(0);
  if (sheet.open().length < sheet.total) toOpen();
}
"""
