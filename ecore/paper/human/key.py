"""A study's key: which system gave each response, and a checksum of every text that raters see."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ecore.errors import InputError
from ecore.files import read_json
from ecore.paper.human.sheets import KINDS, TEXTS

KEY = "key.json"
FORMAT = 1

Record = dict[str, Any]


def read_key(path: Path) -> Record:
    """Read the key of a study and check every part that scoring uses.

    Raises:
        InputError: it is damaged, or no key of a study.
    """
    key = read_json(path)
    if not isinstance(key, dict) or key.get("format") != FORMAT:
        raise InputError(f"{path}: expected the key of a study, format {FORMAT}")
    parts: list[Any] = [key.get(name) for name in ("systems", "contexts", "sheets")]
    systems, contexts, sheets = parts
    wanted = {
        "systems": isinstance(systems, dict) and len(systems) > 0,
        "contexts": isinstance(contexts, dict),
        "sheets": isinstance(sheets, dict) and all(isinstance(sheet, dict) for sheet in sheets.values()),
    }
    for name, right in wanted.items():
        if not right:
            raise InputError(f"{path}: {name}: expected an object as `ecore human export` writes it")
    asked: dict[str, tuple[str, list[Any]]] = {}
    for name, sheet in sheets.items():
        kind, items = sheet.get("kind"), sheet.get("items")
        if kind not in KINDS or not isinstance(sheet.get("rater"), int) or not isinstance(items, dict):
            raise InputError(
                f"{path}: {name}: expected a sheet's kind ({' or '.join(KINDS)}), rater and items"
            )
        for item, entry in items.items():
            if not _is_item(entry, kind, [*systems], contexts):
                raise InputError(
                    f"{path}: {item}: expected its context, systems and sha256 as `ecore human export` writes them"
                )
        # Raters are asked the same, each in an order of their own.
        content = sorted(
            (entry["context"], sorted(map(sorted, entry["systems"]))) for entry in items.values()
        )
        of, expected = asked.setdefault(kind, (name, content))
        if content != expected:
            raise InputError(f"{path}: {name}: expected the contexts and systems of {of}")
    for name, content in (asked[kind] for kind in asked if kind == "rating"):
        rated = [
            (str(context), system) for context, groups in content for group in groups for system in group
        ]
        if sorted(rated) != sorted((context, system) for context in contexts for system in systems):
            raise InputError(f"{path}: {name}: expected every system once for every context")
    return key


def _is_item(entry: Any, kind: str, systems: Sequence[str], contexts: Record) -> bool:
    """Check an item of the key: every text has a checksum, every response the systems that gave it."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(n), list) for n in ("systems", "sha256")):
        return False
    groups, context = entry["systems"], entry.get("context")
    if not all(
        isinstance(group, list) and group and all(name in systems for name in group) for group in groups
    ):
        return False
    named = [*chain.from_iterable(groups)]
    return (
        type(context) is int
        and str(context) in contexts
        and len(groups) + 1 == len(entry["sha256"]) == len(TEXTS[kind])
        and len(set(named)) == len(named)
        and (kind == "rating" or sum(systems[0] in group for group in groups) == 1)
    )
