"""Answers that break spreadsheets, and raters whose opinions are known."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from pathlib import Path

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


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def sheet_path(study: Path, kind: str, rater: int) -> Path:
    return study / f"rater-{rater}" / f"{kind}-{rater}.csv"


def plain(text: str) -> str:
    """Return a text's closing number, which identifies it, whatever a sheet does to it."""
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
