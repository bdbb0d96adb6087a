"""Reading EmpatheticDialogues: the official CSV files or JSON lines, and fetching the official archive."""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecore.errors import InputError
from ecore.files import atomic_path, numbered_lines, parse_json
from ecore.progress import tqdm

ARCHIVE_URL = "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz"
ARCHIVE_SHA256 = "56f234d77b7dd1f005fd365bb17769cfe346c3c84295b69bc069c8ccb83be03d"
CSV_COLUMNS = (
    "conv_id",
    "utterance_idx",
    "context",
    "prompt",
    "speaker_idx",
    "utterance",
    "selfeval",
    "tags",
)
SPLIT_NAMES = ("train", "valid", "test")
_RESAVED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
"""A field that a spreadsheet or pandas has saved: quotes around it, and doubled inside."""
_SELF_EVALUATION = re.compile(r"\d(\|\d)*_?(\d(\|\d)*)?", re.ASCII)


@dataclass(frozen=True)
class Conversation:
    """One dialogue: ``turns`` alternate, the even ones the speaker's and the odd ones the listener's."""

    conv_id: str
    emotion: str
    situation: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """The splits; ``emotions`` are the training split's, sorted; ``skipped`` counts bad lines by file."""

    train: list[Conversation]
    valid: list[Conversation]
    test: list[Conversation]
    emotions: tuple[str, ...]
    skipped: dict[str, int]


class _BadLine(Exception):
    """A line that cannot be used: why, and what was expected."""


def read_corpus(folder: Path | str, skip_bad: bool = False) -> Corpus:
    """Read ``train``, ``valid`` and ``test``, each a ``.jsonl`` or an official ``.csv`` file of ``folder``.

    Raises:
        InputError: a file is missing or unusable; a line is bad and ``skip_bad`` is off.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected one with train, valid and test as .jsonl or .csv"
        )
    paths = [_split_path(folder, name) for name in SPLIT_NAMES]
    train, bad_train = read_split(paths[0], skip_bad=skip_bad)
    emotions = tuple(sorted({conversation.emotion for conversation in train}))
    valid, bad_valid = read_split(paths[1], emotions, skip_bad)
    test, bad_test = read_split(paths[2], emotions, skip_bad)
    skipped = {path.name: bad for path, bad in zip(paths, (bad_train, bad_valid, bad_test), strict=True)}
    return Corpus(train, valid, test, emotions, skipped)


def _split_path(folder: Path, name: str) -> Path:
    found = [
        folder / f"{name}{suffix}" for suffix in (".jsonl", ".csv") if (folder / f"{name}{suffix}").is_file()
    ]
    if len(found) != 1:
        problem = "no such file" if not found else f"lies beside {found[1].name}"
        raise InputError(f"{folder / name}.jsonl: {problem}; expected either {name}.jsonl or {name}.csv")
    return found[0]


def read_split(
    path: Path | str, emotions: Collection[str] | None = None, skip_bad: bool = False
) -> tuple[list[Conversation], int]:
    """Return the conversations of one file, and how many bad lines were skipped.

    In a CSV file, what follows a bad line in the same conversation is bad too, for its turns no longer
    alternate: the conversation ends before it.

    Args:
        path: a ``.jsonl`` or official ``.csv`` file.
        emotions: the emotions that may occur; None accepts all.
        skip_bad: skip and count bad lines.

    Raises:
        InputError: the file is missing, not UTF-8, empty or without a listener's turn; or a line is bad and
            ``skip_bad`` is off.
    """
    path = Path(path)
    reader = _CsvReader(path, emotions) if path.suffix == ".csv" else _JsonReader(path, emotions)
    skipped = 0
    for number, line in numbered_lines(path):
        try:
            reader.read(line, number)
        except (_BadLine, InputError) as error:
            if not skip_bad or number == reader.header_line:
                where = f"{path}:{number}: " if isinstance(error, _BadLine) else ""
                raise InputError(f"{where}{error}") from None
            skipped += 1
    conversations = reader.conversations()
    if not any(len(conversation.turns) > 1 for conversation in conversations):
        what = "no listener turn" if conversations else "empty"
        raise InputError(f"{path}: {what}; expected conversations in which a listener answers a speaker")
    return conversations, skipped


def _check_emotion(emotion: Any, known: Collection[str] | None) -> None:
    if not isinstance(emotion, str) or not emotion.strip():
        raise _BadLine(f"expected an emotion's name, got {emotion!r}")
    if known is not None and emotion not in known:
        raise _BadLine(
            f"unknown emotion {emotion!r}; expected one of the training split's: {', '.join(sorted(known))}"
        )


class _JsonReader:
    header_line = 0

    def __init__(self, path: Path, emotions: Collection[str] | None) -> None:
        self._path, self._emotions = path, emotions
        self._conversations: list[Conversation] = []

    def conversations(self) -> list[Conversation]:
        return self._conversations

    def read(self, line: str, number: int) -> None:
        record = parse_json(line, f"{self._path}:{number}")
        if not isinstance(record, dict):
            raise _BadLine("expected a JSON object with conv_id, emotion, situation and utterances")
        for key in ("conv_id", "emotion", "situation", "utterances"):
            if key not in record:
                raise _BadLine(f"missing key {key!r}; expected conv_id, emotion, situation and utterances")
        _check_emotion(record["emotion"], self._emotions)
        utterances = record["utterances"]
        if not isinstance(utterances, list) or not utterances:
            raise _BadLine("utterances: expected a list of at least one utterance")
        for i, utterance in enumerate(utterances):
            if not isinstance(utterance, dict) or not isinstance(utterance.get("text"), str):
                raise _BadLine(f"utterance {i + 1}: expected an object with speaker and text")
            expected = ("speaker", "listener")[i % 2]
            if utterance.get("speaker") != expected:
                raise _BadLine(
                    f"utterance {i + 1}: expected the {expected}'s (the speaker starts, turns alternate), "
                    f"got speaker {utterance.get('speaker')!r}"
                )
        conv_id, situation = record["conv_id"], record["situation"]
        # Numbers have been taken as ids of conversations.
        if isinstance(conv_id, bool) or not isinstance(conv_id, str | int) or not isinstance(situation, str):
            raise _BadLine("expected conv_id to be text or a whole number, and situation to be text")
        turns = tuple(utterance["text"] for utterance in utterances)
        self._conversations.append(Conversation(str(conv_id), record["emotion"], situation, turns))


class _CsvReader:
    """The official files: no quotes, a comma in a text is written ``_comma_``, utterances count from 1."""

    header_line = 1

    def __init__(self, path: Path, emotions: Collection[str] | None) -> None:
        self._path, self._emotions = path, emotions
        # Per conversation: id, emotion, situation, the two speakers' numbers as they come, turns.
        self._rows: list[tuple[str, str, str, list[str], list[str]]] = []

    def conversations(self) -> list[Conversation]:
        return [
            Conversation(i, emotion, situation, tuple(turns))
            for i, emotion, situation, _, turns in self._rows
        ]

    def read(self, line: str, number: int) -> None:
        fields = line.split(",")
        if number == self.header_line:
            if tuple(fields[: len(CSV_COLUMNS)]) != CSV_COLUMNS:
                raise _BadLine(f"expected the header {','.join(CSV_COLUMNS)}")
            return
        # Validation and test rows may carry candidate responses in a ninth field.
        if len(fields) not in (len(CSV_COLUMNS), len(CSV_COLUMNS) + 1) or not re.fullmatch(
            r"\d{1,6}", fields[1]
        ):
            raise _BadLine(
                f"torn line: expected {len(CSV_COLUMNS)} fields, the second a number, got {len(fields)}"
            )
        if any(map(_RESAVED.fullmatch, fields)):
            raise _BadLine("quotes as another program saves them; expected the file as it is distributed")
        if not fields[4].isdecimal() or not _SELF_EVALUATION.fullmatch(fields[6]):
            raise _BadLine(
                "fields out of place: expected a number as the fifth (speaker_idx) and marks like 5|5|5_2|2|5 as the "
                f"seventh (selfeval), got {fields[4][:20]!r} and {fields[6][:20]!r}"
            )
        conv_id, index, emotion, situation, speaker, text = (f.replace("_comma_", ",") for f in fields[:6])
        if not text.replace(",", " ").strip():  # the official files have none
            raise _BadLine(f"utterance {index}: empty ({text[:20]!r}); expected what was said")
        if int(index) == 1:
            _check_emotion(emotion, self._emotions)
            self._rows.append((conv_id, emotion, situation, [speaker], [text]))
            return
        known_id, _, _, speakers, turns = self._rows[-1] if self._rows else ("", "", "", [], [])
        expected = len(turns) + 1 if conv_id == known_id else 1
        if int(index) != expected:
            raise _BadLine(f"expected utterance {expected} of {conv_id}, got {index}")
        if expected == 2:
            if speaker == speakers[0]:
                raise _BadLine(
                    f"expected the listener's turn (turns alternate), got the speaker's ({speaker}) again"
                )
            speakers.append(speaker)
        elif speaker != speakers[(expected - 1) % 2]:
            raise _BadLine(
                f"expected speaker {speakers[(expected - 1) % 2]} (turns alternate), got {speaker}"
            )
        turns.append(text)


def download(
    folder: Path | str, url: str = ARCHIVE_URL, sha256: str = ARCHIVE_SHA256, progress: bool = True
) -> None:
    """Fetch the official archive, check its hash and put its ``train``, ``valid`` and ``test`` ``.csv`` into
    ``folder``.

    Only those files are taken, under their own names, whatever paths the archive holds.

    Raises:
        InputError: no network, another archive than expected, or files missing in it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download") as temporary:
        archive = Path(temporary) / "archive.tar.gz"
        digest = hashlib.sha256()
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(archive, "wb") as file:
                total = int(response.headers.get("Content-Length", 0)) or None
                with tqdm(
                    total=total, unit="B", unit_scale=True, desc="download", disable=not progress
                ) as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        bar.update(len(block))
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise InputError(
                f"{url}: cannot be fetched ({reason}); expected a network; else bring the data yourself"
            ) from None
        if digest.hexdigest() != sha256:
            raise InputError(f"{url}: SHA-256 is {digest.hexdigest()}, expected {sha256}")
        _extract(archive, folder, url)


def _extract(archive: Path, folder: Path, url: str) -> None:
    wanted = {f"{name}.csv" for name in SPLIT_NAMES}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                source = tar.extractfile(member) if member.isfile() and name in wanted else None
                if source is not None:
                    with atomic_path(folder / name) as temporary, open(temporary, "wb") as file:
                        shutil.copyfileobj(source, file)
                    wanted.discard(name)
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{url}: not a readable archive ({reason})") from None
    if wanted:
        raise InputError(f"{url}: the archive lacks {', '.join(sorted(wanted))}")
