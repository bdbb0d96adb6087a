"""A small corpus, written as JSON lines or as the official CSV."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"

# (conv_id, emotion, situation, turns): the third has a turn that nobody answers, the last no listener at all.
CONVERSATIONS = {
    "train": [
        (
            "t:0",
            "sad",
            "My dog died.",
            ["My dog died yesterday.", "I'm so sorry!", "Thanks, I miss him.", "I bet."],
        ),
        ("t:1", "joyful", "I won.", ["I won the lottery, twice!", "Wow! That's great."]),
        ("t:2", "sad", "Alone again", ["Nobody came to my party", "That is awful.", "Unanswerable."]),
        ("t:3", "joyful", "Sunshine", ["Such lovely sunshine"]),
    ],
    "valid": [("v:0", "sad", "Lost my job", ["I lost my job", "That must be awful."])],
    "test": [("e:0", "joyful", "A zebra", ["I saw a zebra", "Wow, a zebra?"])],
}


def json_line(conv_id: str, emotion: str, situation: str, turns: list[str]) -> str:
    utterances = [{"speaker": ("speaker", "listener")[i % 2], "text": text} for i, text in enumerate(turns)]
    record = {"conv_id": conv_id, "emotion": emotion, "situation": situation, "utterances": utterances}
    return json.dumps(record) + "\n"


def csv_lines(conv_id: str, emotion: str, situation: str, turns: list[str]) -> str:
    rows = [
        (conv_id, str(i), emotion, situation, str(8 - i % 2), text, "5|5|5_2|2|5", "")
        for i, text in enumerate(turns, 1)
    ]
    return "".join(",".join(field.replace(",", "_comma_") for field in row) + "\n" for row in rows)


@pytest.fixture
def jsonl_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "jsonl"
    folder.mkdir()
    for name, conversations in CONVERSATIONS.items():
        text = "".join(json_line(*c) for c in conversations)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def csv_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "csv"
    folder.mkdir()
    for name, conversations in CONVERSATIONS.items():
        text = HEADER + "\n" + "".join(csv_lines(*c) for c in conversations)
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("ECORE_DATA")
    if not folder:
        pytest.skip("ECORE_DATA is not set: no real data")
    return Path(folder)
