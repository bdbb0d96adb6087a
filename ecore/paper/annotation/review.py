"""The sheet on which a person strikes mistaken labels, and the labels that remain.

The sheet is a CSV file for any spreadsheet, with a row for each label that may be wrong; the true emotion has none.
An x in ``strike`` strikes the row's label. The first row of a conversation has its dialogue.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ecore.data.corpus import Conversation
from ecore.errors import InputError
from ecore.evaluation.multi_emotion import Labels
from ecore.files import atomic_path
from ecore.paper.human.sheets import read_text

COLUMNS = ("sample", "conv_id", "dialogue", "true_emotion", "emotion", "strike")

Strikes = dict[tuple[str, str], bool]
"""True for each label, by conv_id and emotion, that was struck."""


def write_sheet(path: Path, conversations: Sequence[Conversation], labels: Labels) -> None:
    """Write the sheet for ``labels``, the true emotion first in each, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        chosen = [c for c in conversations if c.conv_id in labels]
        for sample, conversation in enumerate(chosen, start=1):
            # A cell that begins so is no formula for a spreadsheet, whatever was said.
            said = "\n".join(
                f"{'SL'[i % 2]}{i // 2 + 1}: {turn}" for i, turn in enumerate(conversation.turns)
            )
            true, *others = labels[conversation.conv_id]
            for emotion in others:
                names = (_as_text(name) for name in (true, emotion))
                writer.writerow((sample, _as_text(conversation.conv_id), said, *names, ""))
                said = ""


def _as_text(cell: str) -> str:
    """``cell`` so that no spreadsheet takes it for a formula, a number or a date: behind an apostrophe if it must."""
    return f"'{cell}" if re.match(r"['=+\-@\s]|[\d.,:/eE+\-\s]+$", cell) else cell


def _from_text(cell: str) -> str:
    return cell.removeprefix("'")


def read_sheet(path: Path | str, labels: Labels) -> Strikes:
    """Read the labels that a reviewer struck on a sheet made for ``labels``.

    Rows may be in any order, and columns as well; delimiter, encoding, and blank rows and columns may be those of any
    spreadsheet program (:func:`ecore.paper.human.sheets.read_text`).

    Raises:
        InputError: the file is missing or unreadable; or, with its line: other columns, a row that was torn, does
            not belong to these labels or occurs twice, or a strike other than x; or rows are missing.
    """
    path = Path(path)
    strikes: Strikes = {}
    for line, row in _rows(path):
        conv_id, true, emotion = (_from_text(row[name]) for name in ("conv_id", "true_emotion", "emotion"))
        mark = row["strike"].lower()
        known = labels.get(conv_id)
        if known is None or true != known[0] or emotion not in known[1:]:
            raise InputError(
                f"{path}:{line}: no such label: {conv_id!r}, true emotion {true!r}, emotion {emotion!r}; "
                "expected the rows as they were written, with nothing changed but strike"
            )
        if (conv_id, emotion) in strikes:
            raise InputError(f"{path}:{line}: {emotion!r} of {conv_id} again; expected each label once")
        if mark not in ("", "x"):
            raise InputError(f"{path}:{line}: strike: expected x or nothing, got {row['strike']!r}")
        strikes[conv_id, emotion] = mark == "x"
    asked = [(conv_id, emotion) for conv_id, names in labels.items() for emotion in names[1:]]
    missing = [label for label in asked if label not in strikes]
    if missing:
        raise InputError(
            f"{path}: {len(missing):,} of {len(asked):,} rows are missing, first {missing[0][1]!r} of "
            f"{missing[0][0]}; expected every row that was written"
        )
    return strikes


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line and fields of each row, blank rows and what a spreadsheet added behind the columns left out."""
    content = read_text(path)
    header = next((line for line in content.splitlines() if line.strip(',;\t "')), "")
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    rows, columns, line = [], None, 1
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            while fields and not fields[-1] and len(fields) > len(columns or ()):
                fields.pop()
            if columns is None and any(fields):
                columns = fields
                if sorted(columns) != sorted(COLUMNS):
                    raise InputError(
                        f"{path}:{line}: expected the columns {', '.join(COLUMNS)}, got {header[:80]!r}"
                    )
            elif columns is not None and any(fields):
                # Spreadsheets leave the last delimiter out where a block of rows has nothing in the last column.
                if len(fields) == len(columns) - 1 and columns[-1] == "strike":
                    fields.append("")
                if len(fields) != len(columns):
                    raise InputError(
                        f"{path}:{line}: torn row: expected {len(columns)} fields, got {len(fields)}"
                    )
                rows.append((line, dict(zip(columns, fields, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: torn row ({error}); expected a CSV file") from None
    if columns is None:
        raise InputError(f"{path}: empty; expected the columns {', '.join(COLUMNS)}")
    return rows


def refuse_marked(path: Path) -> None:
    """Raise where a sheet with strikes would be overwritten.

    Raises:
        InputError: ``path`` has strikes, or cannot be read as a sheet.
    """
    if path.is_file() and any(row["strike"].strip() for _, row in _rows(path)):
        raise InputError(f"{path}: has strikes, which would be lost; move it away or choose another --out")


def strike(labels: Labels, sheets: Sequence[Strikes]) -> Labels:
    """``labels`` without what half of the reviewers or more struck; a conversation with the true emotion alone
    drops out."""
    kept = {}
    for conv_id, (true, *others) in labels.items():
        left = [e for e in others if 2 * sum(sheet[conv_id, e] for sheet in sheets) < len(sheets)]
        if left:
            kept[conv_id] = (true, *left)
    return kept


def decisions(sheets: Mapping[str, Strikes]) -> list[tuple[str, tuple[str, str], bool]]:
    """Reviewer, label and decision, as :func:`ecore.paper.annotation.agreement.alpha` wants them."""
    return [(name, label, struck) for name, sheet in sheets.items() for label, struck in sheet.items()]
