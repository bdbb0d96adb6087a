"""A rater's sheet as CSV: what is asked (Section 4 and Appendix I of the paper), written and read back.

A sheet has one ``kind``: ``rating`` asks for Fluency, Relevance and Empathy of a response, each from 1 to 5; ``ab``
asks which of two responses is better.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecore.errors import InputError
from ecore.files import atomic_path

KINDS = ("rating", "ab")
ASPECTS = ("fluency", "relevance", "empathy")
QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "rating": dict.fromkeys(ASPECTS, ("1", "2", "3", "4", "5")),
    "ab": {"choice": ("A", "B", "tie")},
}
TEXTS = {"rating": ("context", "response"), "ab": ("context", "response_a", "response_b")}
COLUMNS = {kind: ["item", *TEXTS[kind], *QUESTIONS[kind]] for kind in KINDS}


@dataclass(frozen=True)
class Item:
    """One line of a sheet: its id, the dialogue's turns, and the response to rate or the two to choose from."""

    id: str
    turns: Sequence[str]
    responses: Sequence[str]

    def cells(self) -> list[str]:
        """The texts as a sheet has them, one for each column of ``TEXTS``.

        A cell starts with a word and a colon, so that no spreadsheet takes it for a formula, a number or a date. A
        sheet opened with the wrong delimiter is torn at commas or semicolons instead of where cells end: there an
        apostrophe goes before what would start a formula.
        """
        context = " | ".join(f"{speaker(i)}: {turn}" for i, turn in enumerate(self.turns))
        texts = [context, *(f"Response: {response}" for response in self.responses)]
        return [re.sub(r"([,;|]['\"\s]*)([=+\-@＝＋－＠])", r"\1'\2", text) for text in texts]


@dataclass(frozen=True)
class Sheet:
    """A finished sheet: its name in the key, and each item's answers in the order of ``QUESTIONS``."""

    name: str
    kind: str
    rater: int
    answers: dict[str, list[str]]


def speaker(turn: int) -> str:
    """Return the speaker of the turn of this number, from 0."""
    return ("Speaker", "Listener")[turn % 2]


def clean(text: str) -> str:
    """``text`` as one line without control characters; what UTF-8 cannot hold becomes a question mark."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", text.encode("utf-8", "replace").decode()).strip()


def checksum(cell: str) -> str:
    """SHA-256 of a text cell, as hexadecimal; white space does not count."""
    return hashlib.sha256(" ".join(cell.split()).encode()).hexdigest()


def write_sheet(path: Path, kind: str, items: Sequence[Item]) -> None:
    """Write an empty sheet, every cell quoted, in UTF-8 with the byte order mark by which Excel knows it."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(COLUMNS[kind])
        writer.writerows([item.id, *item.cells(), *("" for _ in QUESTIONS[kind])] for item in items)


def read_sheet(path: Path | str, sheets: dict[str, dict[str, Any]]) -> Sheet:
    """Read a finished sheet and hold it against the ``sheets`` of the study's key.

    Order of lines, quotes, delimiter (comma, semicolon, tab), line ends and encoding (UTF-8, UTF-16, or Windows-1252
    where that lost nothing) may be those of any spreadsheet program.

    Raises:
        InputError: by line, what is missing, out of range, unknown, double or changed.
    """
    lines = _lines(Path(path))
    _, header = next(lines)
    kind = KINDS[[*COLUMNS.values()].index(header)]
    owner = {item: name for name, sheet in sheets.items() if sheet["kind"] == kind for item in sheet["items"]}
    name, begin = "", 0  # the sheet, and the line that named it
    seen: dict[str, int] = {}
    answers: dict[str, list[str]] = {}
    for line, (item, *cells) in lines:
        where = f"{path}:{line}: {item[:40]}"
        if item not in owner:
            raise InputError(f"{where}: unknown item, expected one of the study's {kind} items")
        name, begin = name or owner[item], begin or line
        if owner[item] != name:
            raise InputError(
                f"{where}: of sheet {owner[item]}, expected one of sheet {name} as on line {begin}"
            )
        if item in seen:
            raise InputError(f"{where}: the item is on line {seen[item]} already")
        seen[item] = line
        _check_texts(where, kind, cells, sheets[name]["items"][item]["sha256"])
        answers[item] = [
            _answer(f"{where}: {column}", cell, allowed)
            for (column, allowed), cell in zip(
                QUESTIONS[kind].items(), cells[len(TEXTS[kind]) :], strict=True
            )
        ]
    if not name:
        raise InputError(f"{path}: no items in it, expected a finished sheet")
    missing = [item for item in sheets[name]["items"] if item not in answers]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path}: {missing[0]}{others} missing, expected every item of sheet {name}")
    return Sheet(name, kind, sheets[name]["rater"], answers)


def _check_texts(where: str, kind: str, cells: Sequence[str], checksums: Sequence[str]) -> None:
    for column, cell, expected in zip(TEXTS[kind], cells, checksums, strict=False):
        if checksum(cell) != expected:
            raise InputError(
                f"{where}: {column} is not the text that was exported (edited, or letters lost in saving: save as "
                f"CSV UTF-8), got {cell[:60]!r}"
            )


def _answer(where: str, cell: str, allowed: Sequence[str]) -> str:
    """The one of ``allowed`` that ``cell`` says; spreadsheets make 4.0 or 4,0 of 4, and people write b for B."""
    said = re.sub(r"[.,]0+$", "", cell).lower()
    for value in allowed:
        if said == value.lower():
            return value
    found = f"is {cell[:40]!r}" if cell else "is missing"
    raise InputError(f"{where} {found}, expected one of {', '.join(allowed)}")


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of each line that is not blank and its cells, one for each column; the header first."""
    text = read_text(path)
    first = next((line for line in text.splitlines() if line.strip(',;\t "')), "")
    for delimiter in ",;\t":
        header = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), [])]
        while header and not header[-1]:  # columns that a spreadsheet added
            header.pop()
        if header in COLUMNS.values():
            break
    else:
        known = " or ".join(", ".join(columns) for columns in COLUMNS.values())
        raise InputError(f"{path}:1: expected the columns {known}; got {first[:80]!r}")
    width = len(header)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells[width:]):
                raise InputError(f"{path}:{reader.line_num}: expected {width} columns, got {len(cells)}")
            if any(cells):
                yield reader.line_num, (cells + [""] * width)[:width]
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def read_text(path: Path) -> str:
    """Read text from a spreadsheet program: UTF-8, UTF-16 or, where no letter was lost, Windows-1252.

    Raises:
        InputError: the file is missing, cannot be read, or is no such text.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ("utf-16",) if utf16 else ("utf-8-sig", "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise InputError(f"{path}: not text in UTF-8, expected a sheet saved as CSV")
