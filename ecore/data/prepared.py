"""The prepared folder: its files, how they are written, and how they are read back.

A prepared folder holds ``meta.json``, ``vocabulary.json``, ``intensity.npy`` [V], ``related.npy`` and
``related_score.npy`` [V, R], ``embeddings.npy`` [V, G] where GloVe files were given, and for each split the arrays of
:class:`ecore.data.batches.SplitArrays`: ``SPLIT.words.npy`` and so on, its texts as ``SPLIT.texts.jsonl``.
No other module knows these names.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ecore.data.batches import Split, SplitArrays
from ecore.data.corpus import Conversation
from ecore.data.vocabulary import Vocabulary
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.files import numbered_lines, parse_json, read_bytes, read_json, write_json

FORMAT = 1
"""Version of the prepared folder; another one is refused."""
SPLITS = ("train", "valid", "test")
META, VOCABULARY, EMBEDDINGS = "meta.json", "vocabulary.json", "embeddings.npy"


def is_prepared(folder: Path) -> bool:
    """Return whether a folder was made by ``ecore prepare``."""
    return (folder / META).is_file()


class PreparedData:
    """A folder made by :func:`ecore.data.prepare.prepare`; large arrays stay on disk, memory-mapped."""

    folder: Path
    vocabulary: Vocabulary
    tables: WordTables
    embeddings: npt.NDArray[np.float32] | None
    """[V, G], NaN where a word has no vector; None where no GloVe file was given."""
    meta: dict[str, Any]
    train: Split
    valid: Split
    test: Split

    @classmethod
    def load(cls, folder: Path | str) -> PreparedData:
        """Open a prepared folder.

        Raises:
            InputError: the folder is missing, is no prepared folder, has another format, or is damaged.
        """
        self = cls()
        self.folder = folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected one made by `ecore prepare`")
        if not is_prepared(folder):
            raise InputError(f"{folder}: not a prepared folder (no {META}); make one with `ecore prepare`")
        self.meta = _read_meta(folder)
        self.vocabulary = Vocabulary.load(folder / VOCABULARY)
        if self.vocabulary.fingerprint != self.meta["vocabulary_fingerprint"]:
            raise InputError(f"{folder / VOCABULARY}: not the vocabulary that the folder was prepared with")
        names = {"intensity": 1, "related": 2, "related_score": 2}
        tables = {name: _load(folder, _array(name), ndim) for name, ndim in names.items()}
        self.embeddings = _load(folder, EMBEDDINGS, 2) if self.meta["glove"] else None
        sized = tables if self.embeddings is None else {**tables, "embeddings": self.embeddings}
        for name, array in sized.items():
            if len(array) != len(self.vocabulary):
                raise _broken(folder / f"{name}.npy", f"{len(array)} rows for {len(self.vocabulary)} words")
        self.tables = WordTables(**{name: torch.from_numpy(array.copy()) for name, array in tables.items()})
        self.train, self.valid, self.test = (
            _read_split(folder, name, self.vocabulary.emotions) for name in SPLITS
        )
        _verify(folder, self.meta)  # last: a fault of one file is reported by its name
        return self

    def conversations(self) -> list[Conversation]:
        """Return the conversations of all splits, as they were written.

        Raises:
            InputError: a file is missing or damaged.
        """
        return [c for split in SPLITS for c in read_conversations(self.folder, split)]

    def thresholds(self, literal: Sequence[float], use_literal: bool = False) -> tuple[float, ...]:
        """The thresholds to use for the paper's ``literal`` ones on this data's intensities.

        Lexicons differ in how they spread, so 0.075 and 0.15 become the thresholds that the same shares of
        words pass under this one (:func:`ecore.data.intensity.matched_thresholds`). Source ``skep``, the
        paper's, is taken literally, and with ``none`` all are 0 (Table 9).

        Raises:
            InputError: a threshold that has no match here.
        """
        if self.meta["intensity"] == "none":
            return (0.0,) * len(literal)
        if use_literal or self.meta["intensity"] == "skep":
            return tuple(map(float, literal))
        matched = {0.0: 0.0} | {float(key): value for key, value in self.meta["thresholds"].items()}
        for value in literal:
            if value not in matched:
                known = ", ".join(str(v) for v in matched)
                raise InputError(
                    f"thresholds: no match for {value} in {self.folder} (known: {known}); take it literally"
                )
        return tuple(matched[value] for value in literal)


def read_emotions(folder: Path) -> tuple[str, ...]:
    """Return the emotions of a prepared folder.

    Raises:
        InputError: its vocabulary is missing or damaged.
    """
    return Vocabulary.load(folder / VOCABULARY).emotions


def read_conversations(folder: Path, split: str) -> list[Conversation]:
    """Return the conversations of one split of a prepared folder, as they were written.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = folder / _texts(split)
    _verify(folder, _read_meta(folder))
    try:
        records = [parse_json(line, f"{path}:{number}") for number, line in numbered_lines(path)]
        return [Conversation(r["conv_id"], r["emotion"], r["situation"], tuple(r["turns"])) for r in records]
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(path, error) from None


# Writing


def write_words(
    folder: Path, vocabulary: Vocabulary, tables: WordTables, embeddings: npt.NDArray[np.float32] | None
) -> None:
    """Write the vocabulary and what is known of its words."""
    vocabulary.save(folder / VOCABULARY)
    for name, table in tables._asdict().items():
        np.save(folder / _array(name), table.numpy())
    if embeddings is not None:
        np.save(folder / EMBEDDINGS, embeddings)


def write_split(folder: Path, name: str, arrays: SplitArrays) -> None:
    """Write the arrays of one split."""
    for part, array in arrays._asdict().items():
        if part != "texts":
            np.save(folder / _array(f"{name}.{part}"), array)
    (folder / _texts(name)).write_bytes(arrays.texts.tobytes())


def copy_with_intensity(data: PreparedData, folder: Path, intensity: npt.NDArray[np.float32]) -> None:
    """Copy all of ``data`` but its meta.json to ``folder``, with other intensities [V]."""
    for path in _files(data.folder):
        if path.name != _array("intensity"):
            shutil.copyfile(path, folder / path.name)  # not its rights: it may be read-only
    np.save(folder / _array("intensity"), intensity)


def write_meta(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Write meta.json, when all other files are written; return it with their fingerprint."""
    meta = {**meta, "fingerprint": fingerprint(folder)}
    write_json(folder / META, meta, sealed=True)
    return meta


def fingerprint(folder: Path) -> str:
    """Return sixteen hexadecimal digits of every file's content but meta.json's: equal data has equal digits.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    """Return the files that ``prepare`` wrote but meta.json, sorted; what somebody else put there is not of them."""
    ours = (path for path in folder.iterdir() if path.suffix == ".npy" or path.name.endswith(".texts.jsonl"))
    return sorted([*ours, folder / VOCABULARY])


def _verify(folder: Path, meta: dict[str, Any]) -> None:
    found = fingerprint(folder)
    if found != meta.get("fingerprint"):
        raise InputError(
            f"{folder}: damaged: its arrays or texts are not those that were prepared (fingerprint {found}, expected "
            f"{meta.get('fingerprint')}); prepare it again"
        )


# Reading


def _array(name: str) -> str:
    return f"{name}.npy"


def _texts(split: str) -> str:
    return f"{split}.texts.jsonl"


def _read_split(folder: Path, name: str, emotions: Sequence[str]) -> Split:
    dimensions = {"words": 1, "states": 1, "samples": 2, "concepts": 2, "text_offsets": 1}
    parts = {part: _load(folder, _array(f"{name}.{part}"), ndim) for part, ndim in dimensions.items()}
    try:
        texts = np.memmap(folder / _texts(name), dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise _broken(folder / _texts(name), error) from None
    arrays = SplitArrays(**parts, texts=texts)
    samples = arrays.samples
    if len(samples) == 0 or samples.shape[1] != 6:
        raise _broken(folder / _array(f"{name}.samples"), f"shape {samples.shape}")
    _, _, end, _, conversation, _ = samples.T
    if (
        end.max() > min(len(arrays.words), len(arrays.states))
        or len(arrays.concepts) != len(samples)
        or conversation.max() + 2 > len(arrays.text_offsets)
        or arrays.text_offsets[-1] != len(arrays.texts)
    ):
        raise _broken(folder / f"{name}.*", "its arrays do not fit together")
    return Split(name, arrays, emotions)


def _read_meta(folder: Path) -> dict[str, Any]:
    meta = read_json(folder / META)
    version = meta.get("format") if isinstance(meta, dict) else None
    if version != FORMAT:
        raise InputError(f"{folder / META}: folder of format {version}, expected {FORMAT}; prepare it again")
    kinds: dict[str, type] = {
        "vocabulary_fingerprint": str,
        "intensity": str,
        "thresholds": dict,
        "glove": list,
    }
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind):
            raise _broken(folder / META, f"no {key}")
    return dict(meta)


def _load(folder: Path, name: str, ndim: int) -> npt.NDArray[Any]:
    path = folder / name
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises almost anything, SyntaxError among it
        raise _broken(path, error) from None
    if array.ndim != ndim:
        raise _broken(path, f"{array.ndim} dimensions, expected {ndim}")
    return array


def _broken(path: Path, why: object) -> InputError:
    reason = str(why).replace("\n", " ")
    return InputError(
        f"{path}: missing or damaged ({reason}); expected what `ecore prepare` wrote, prepare it again"
    )
