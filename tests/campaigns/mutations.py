"""Ways to spoil a file: its bytes, its lines, values of its JSON, fields of its tables."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from typing import Any

WRONG: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        -0.0,
        1e308,
        2**63,
        10**50,
        "",
        " ",
        "x",
        "0",
        "\x1b[2J\x07",
        "a\0b",
        "\u2028",
    ),
    *(
        "\ud83d",
        "é" * 5000,
        [],
        {},
        [[]],
        [None],
        {"a": 1},
        [1, "a", {}],
        ["sad", "sad"],
        "../../etc/passwd",
        "/",
    ),
]
"""Values that stand where others belong. Half a surrogate pair is written as an escape."""
TEXTS = [
    "",
    " ",
    "-1",
    "nan",
    "inf",
    "1e999",
    "9" * 5000,
    "x",
    '"',
    "'",
    "\0",
    "\x1b[31m",
    "=1+1",
    "½",
    "\u202e",
    ",",
    "\t",
]
"""Fields that stand where others belong."""


def bytes_of(content: bytes, picks: random.Random) -> bytes:
    """Spoil bytes, whatever they mean."""
    place = picks.randrange(len(content) + 1)
    lines = content.splitlines(keepends=True) or [b""]
    line = picks.randrange(len(lines))
    text = content.decode("utf-8", "replace")
    ways: list[Callable[[], bytes]] = [
        lambda: content[:place],
        lambda: b"",
        lambda: b"\n\n \n",
        lambda: content[:place] + bytes([picks.randrange(256)]) + content[place + 1 :],
        lambda: content[:place] + picks.randbytes(20) + content[place:],
        lambda: content[:place] + b"\0" * 4096 + content[place:],
        lambda: content[:place] + b"\xed\xa0\xbd" + content[place:],
        lambda: content[:place] + b"\x1b[2J" + content[place:],
        lambda: b"\xef\xbb\xbf" * 2 + content,
        lambda: text.encode("utf-16"),
        lambda: text.replace("o", "ö").encode("latin-1", "replace"),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\r"),
        lambda: content.replace(b"\n", b""),
        lambda: b"".join([*lines[:line], *lines[line + 1 :]]),
        lambda: b"".join([*lines[:line], lines[line], *lines[line:]]),
        lambda: b"".join(picks.sample(lines, len(lines))),
        lambda: b"".join([*lines[:line], b"[" * 100_000 + b"\n", *lines[line:]]),
        lambda: b"".join([*lines[:line], b"1 " * 300_000 + b"\n", *lines[line:]]),
        lambda: b"".join([*lines[:line], b'{"a": ' + b"7" * 5000 + b"}\n", *lines[line:]]),
        lambda: b"<html><body>Not found</body></html>\n",
        lambda: gzip.compress(content),
        lambda: picks.randbytes(300),
        lambda: content + content[: place // 2],
    ]
    return picks.choice(ways)()


def json_of(content: bytes, picks: random.Random, lines: bool) -> bytes:
    """Put a wrong value into JSON, or into one of its lines, without the checksum that would tell."""
    texts = content.decode().splitlines() if lines else [content.decode()]
    index = picks.randrange(len(texts))
    value = json.loads(texts[index])
    if isinstance(value, dict):
        value.pop("checksum", None)
        value.pop("crc32", None)
    texts[index] = json.dumps(_spoilt(value, picks))
    if picks.random() < 0.2:
        texts[index] = texts[index].replace(": ", picks.choice([": NaN, ", ": 1e999, ", ": -Infinity, "]), 1)
    return "\n".join(texts).encode() + b"\n"


def _spoilt(value: Any, picks: random.Random) -> Any:
    inside = isinstance(value, dict | list) and value and picks.random() < 0.8
    if not inside:
        return picks.choice(WRONG)
    if isinstance(value, list):
        place = picks.randrange(len(value))
        if picks.random() < 0.15:
            return value[:place] + value[place + 1 :]
        return [*value[:place], _spoilt(value[place], picks), *value[place + 1 :]]
    key = picks.choice(list(value))
    chance = picks.random()
    if chance < 0.15:
        return {k: v for k, v in value.items() if k != key}
    if chance < 0.2:
        return {**value, picks.choice(["extra", "", "__class__", "\x1b[2J"]): picks.choice(WRONG)}
    return {**value, key: _spoilt(value[key], picks)}


def table_of(content: bytes, picks: random.Random, delimiter: str) -> bytes:
    """Spoil a field of a table, or how many there are."""
    lines = content.decode("utf-8-sig").splitlines()
    index = picks.randrange(len(lines))
    fields = lines[index].split(delimiter)
    place = picks.randrange(len(fields))
    chance = picks.random()
    if chance < 0.15:
        del fields[place]
    elif chance < 0.3:
        fields.insert(place, picks.choice(TEXTS))
    elif chance < 0.4:
        fields = ['"' + field.replace('"', '""') + '"' for field in fields]
    elif chance < 0.5:
        fields[place] = '"' + fields[place]
    else:
        fields[place] = picks.choice(TEXTS)
    lines[index] = delimiter.join(fields)
    if chance > 0.9:
        lines = [line.replace(delimiter, picks.choice(";\t, |")) for line in lines]
    return "\n".join(lines).encode() + b"\n"
