"""From a corpus to a prepared folder: everything that training reads, computed once.

A prepared folder holds ``meta.json``, ``vocabulary.json``, ``intensity.npy`` [V], ``related.npy`` and
``related_score.npy`` [V, R], ``embeddings.npy`` [V, G] where GloVe files were given, and for each split

- ``words.npy`` int32 and ``states.npy`` uint8: the words of all conversations in a row, and who said them;
- ``samples.npy`` int64 [n, 6]: where a context starts and its response starts and ends in ``words``, the
  emotion, the conversation and the turn;
- ``concepts.npy`` int32 [n, C]: related words of the context;
- ``texts.jsonl`` and ``text_offsets.npy``: the conversations as written, and the byte at which each starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ecore.data.batches import (
    FORMAT,
    LISTENER,
    MAX_CONTEXT_WORDS,
    MAX_RESPONSE_WORDS,
    SPEAKER,
    SPLITS,
    WordTables,
)
from ecore.data.concepts import MOST_CONCEPTS, related_words, select_related
from ecore.data.corpus import Conversation, Corpus, read_corpus
from ecore.data.embeddings import coverage, load_vectors
from ecore.data.intensity import expect_source, matched_thresholds, with_floor, word_intensity
from ecore.data.text import tokenize
from ecore.data.vocabulary import PAD, Vocabulary
from ecore.errors import InputError
from ecore.files import write_json
from ecore.progress import tqdm

VOCABULARIES = ("literature", "train")


@dataclass(frozen=True)
class _Words:
    """The words of one conversation, up to its last listener turn: what follows is in no sample."""

    turns: list[list[str]]
    situation: list[str]


def prepare(
    data: Path | str,
    out: Path | str,
    *,
    glove: Sequence[Path | str] = (),
    intensity: str = "vader",
    intensity_file: Path | str | None = None,
    intensity_floor: float = 0.01,
    vocabulary: str = "literature",
    min_count: int = 2,
    relations: Path | str | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepare the corpus in folder ``data`` as folder ``out``, print how intensities fall, and return
    ``meta.json``.

    ``out`` appears when all is done, or not at all.

    Args:
        data: folder with ``train``, ``valid`` and ``test`` (:func:`ecore.data.corpus.read_corpus`).
        out: folder to make; it must not hold anything yet.
        glove: files of word vectors, to stand side by side (:func:`ecore.data.embeddings.load_vectors`).
        intensity: source of word intensities, with its ``intensity_file`` and ``intensity_floor``
            (:func:`ecore.data.intensity.word_intensity`, :func:`~ecore.data.intensity.with_floor`).
        vocabulary: ``literature``, every word of contexts, responses and situations of all splits; or
        ``train``,
            those that stand there at least ``min_count`` times in the training split.
        relations: file of commonsense relations (:func:`ecore.data.concepts.related_words`).
        skip_bad: skip and count bad lines of the corpus.

    Raises:
        InputError: anything wrong with the input, or ``out`` holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; expected a new or empty folder")
    if out.exists() and out.samefile("."):
        raise InputError(f"{out}: is the current folder; expected a new one")
    if vocabulary not in VOCABULARIES:
        raise InputError(f"vocabulary: expected one of {', '.join(VOCABULARIES)}, got {vocabulary!r}")
    if min_count < 1:
        raise InputError(f"min_count: expected at least 1, got {min_count}")
    for file in (*glove, intensity_file, relations):
        if file is not None and not Path(file).is_file():
            raise InputError(f"{file}: no such file")
    expect_source(intensity, intensity_file)
    corpus = read_corpus(data, skip_bad)
    words = _tokenized(corpus, progress)
    counted = SPLITS if vocabulary == "literature" else ("train",)
    counts: Counter[str] = Counter()
    for name in counted:
        for conversation in words[name]:
            for tokens in (conversation.situation, *conversation.turns):
                counts.update(tokens)
    known = Vocabulary.from_counts(counts, corpus.emotions, 1 if vocabulary == "literature" else min_count)
    bare = word_intensity(known.words, intensity, intensity_file)
    floored = with_floor(bare, intensity_floor)
    vectors = load_vectors(glove, known.words, progress) if glove else None
    if relations is None:
        related = np.zeros((len(known), 0), dtype=np.int32), np.zeros((len(known), 0), dtype=np.float32)
    else:
        related = related_words(relations, known.words, bare)
    tables = WordTables(torch.from_numpy(floored), *map(torch.from_numpy, related))

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        for table_name, table in tables._asdict().items():
            np.save(temporary / f"{table_name}.npy", table.numpy())
        splits = {
            name: _write_split(temporary, name, getattr(corpus, name), words[name], known, tables, progress)
            for name in SPLITS
        }
        meta: dict[str, Any] = {
            "format": FORMAT,
            "vocabulary": vocabulary,
            "vocabulary_fingerprint": known.fingerprint,
            "vocabulary_size": len(known),
            "min_count": None if vocabulary == "literature" else min_count,
            "intensity": intensity,
            "intensity_file": None if intensity_file is None else Path(intensity_file).name,
            "intensity_floor": intensity_floor,
            **intensity_statistics(temporary, bare, floored),
            "relations": None if relations is None else Path(relations).name,
            "glove": [Path(file).name for file in glove],
            "splits": splits,
            "skipped_lines": corpus.skipped,
        }
        if vectors is not None:
            np.save(temporary / "embeddings.npy", vectors)
            occurrences = np.array([counts[word] for word in known.words])
            meta["glove_coverage"] = dict(
                zip(("types", "tokens"), coverage(vectors, occurrences), strict=True)
            )
        known.save(temporary / "vocabulary.json")
        meta["fingerprint"] = fingerprint(temporary)
        write_json(temporary / "meta.json", meta)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(describe(meta))
    return meta


def _tokenized(corpus: Corpus, progress: bool) -> dict[str, list[_Words]]:
    total = sum(len(getattr(corpus, name)) for name in SPLITS)
    with tqdm(total=total, desc="words", unit=" conversations", disable=not progress) as bar:
        result: dict[str, list[_Words]] = {}
        for name in SPLITS:
            result[name] = []
            for conversation in getattr(corpus, name):
                turns = conversation.turns[: len(conversation.turns) // 2 * 2]
                result[name].append(
                    _Words([tokenize(turn) for turn in turns], tokenize(conversation.situation))
                )
                bar.update()
    return result


def _write_split(
    folder: Path,
    name: str,
    conversations: list[Conversation],
    words: list[_Words],
    vocabulary: Vocabulary,
    tables: WordTables,
    progress: bool,
) -> dict[str, Any]:
    """Write a split's files and return its statistics."""
    flat: list[int] = []
    states: list[int] = []
    samples: list[tuple[int, int, int, int, int, int]] = []
    concepts: list[list[int]] = []
    truncated = 0
    emotions = {emotion: i for i, emotion in enumerate(vocabulary.emotions)}
    rows = zip(conversations, words, strict=True)
    for c, (conversation, spoken) in enumerate(
        tqdm(rows, desc=name, total=len(words), unit=" conversations", disable=not progress)
    ):
        first = len(flat)
        for turn, tokens in enumerate(spoken.turns):
            begin = len(flat)
            flat += vocabulary.encode(tokens)
            states += [LISTENER if turn % 2 else SPEAKER] * len(tokens)
            if turn % 2:
                if len(tokens) > MAX_RESPONSE_WORDS:
                    raise InputError(
                        f"{name}: conversation {conversation.conv_id}: a response of {len(tokens):,} words; "
                        f"expected at most {MAX_RESPONSE_WORDS:,}"
                    )
                start = max(first, begin - MAX_CONTEXT_WORDS)
                truncated += start > first
                samples.append((start, begin, len(flat), emotions[conversation.emotion], c, turn))
                concepts.append(select_related(flat[start:begin], tables))
    table = np.array(samples, dtype=np.int64)
    related = np.full((len(samples), MOST_CONCEPTS if tables.related.shape[1] else 0), PAD, dtype=np.int32)
    for row, ids in zip(related, concepts, strict=True):
        row[: len(ids)] = ids
    texts = [
        json.dumps({"conv_id": c.conv_id, "emotion": c.emotion, "situation": c.situation, "turns": c.turns})
        + "\n"
        for c in conversations
    ]
    np.save(folder / f"{name}.words.npy", np.array(flat, dtype=np.int32))
    np.save(folder / f"{name}.states.npy", np.array(states, dtype=np.uint8))
    np.save(folder / f"{name}.samples.npy", table)
    np.save(folder / f"{name}.concepts.npy", related)
    # JSON escapes all but ASCII, so a character is a byte.
    np.save(
        folder / f"{name}.text_offsets.npy", np.cumsum([0] + [len(text) for text in texts], dtype=np.int64)
    )
    (folder / f"{name}.texts.jsonl").write_text("".join(texts), encoding="ascii")

    context, response = table[:, 1] - table[:, 0], table[:, 2] - table[:, 1]
    return {
        "conversations": len(conversations),
        "samples": len(samples),
        "truncated_contexts": truncated,
        "context_words": _spread(context),
        "response_words": _spread(response),
        "related_words": float((related != PAD).sum(axis=1).mean()),
    }


def _spread(lengths: npt.NDArray[np.int64]) -> dict[str, float]:
    p90, p99 = np.percentile(lengths, (90, 99))
    return {"mean": float(lengths.mean()), "p90": float(p90), "p99": float(p99), "max": int(lengths.max())}


def intensity_statistics(
    folder: Path, bare: npt.NDArray[np.float32], floored: npt.NDArray[np.float32]
) -> dict[str, Any]:
    """Matched thresholds and what passes each threshold, over the words of all training contexts.

    A turn's words count once for every context that holds them.
    """
    words = np.load(folder / "train.words.npy")
    start, end = np.load(folder / "train.samples.npy")[:, :2].T
    change = np.zeros(len(words) + 1, dtype=np.int64)
    np.add.at(change, start, 1)
    np.add.at(change, end, -1)
    counts = np.bincount(words, weights=change.cumsum()[:-1], minlength=len(floored))
    total = max(counts.sum(), 1)
    matched = matched_thresholds(floored, counts)

    def shares(threshold: float) -> dict[str, float]:
        passes = floored >= np.float32(threshold)
        before = np.concatenate(([0], passes[words].cumsum()))
        return {
            "threshold": threshold,
            "words": float(counts[passes].sum() / total),
            "contexts": float((before[end] > before[start]).mean()),
        }

    return {
        "thresholds": {str(literal): threshold for literal, threshold in matched.items()},
        "zero_intensity": float(counts[bare == 0].sum() / total),
        "intensity_shares": {
            str(literal): {"literal": shares(literal), "matched": shares(threshold)}
            for literal, threshold in matched.items()
        },
    }


def fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits of every file's content: data prepared alike have the same."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def describe(meta: dict[str, Any]) -> str:
    """What a prepared folder holds, for people: its sizes, and how much passes each intensity threshold."""
    lines = [f"{'split':<8}{'conversations':>14}{'samples':>9}{'context words':>38}{'response words':>38}"]
    for name, split in meta["splits"].items():
        spreads = (
            "{mean:.1f} mean, {p90:.0f} p90, {p99:.0f} p99, {max} max".format(**split[key])
            for key in ("context_words", "response_words")
        )
        lines.append(
            f"{name:<8}{split['conversations']:>14}{split['samples']:>9}"
            + "".join(f"{s:>38}" for s in spreads)
        )
    truncated = sum(split["truncated_contexts"] for split in meta["splits"].values())
    lines.append(f"contexts cut to their last {MAX_CONTEXT_WORDS} words: {truncated}")
    skipped = sum(meta["skipped_lines"].values())
    lines.append(f"bad lines skipped: {skipped}")
    lines.append(f"vocabulary ({meta['vocabulary']}): {meta['vocabulary_size']} words, special ones counted")
    if meta["glove"]:
        types, tokens = (100 * meta["glove_coverage"][key] for key in ("types", "tokens"))
        lines.append(f"word vectors: {types:.1f} % of word types, {tokens:.1f} % of words")
    if meta["relations"]:
        related = meta["splits"]["train"]["related_words"]
        lines.append(f"related words: {related:.1f} a training context")
    lines.append(
        f"intensity ({meta['intensity']}): c = 0 for {100 * meta['zero_intensity']:.0f} % of the training "
        f"contexts' words, before the floor of {meta['intensity_floor']:g}"
    )
    if meta["intensity"] != "none":
        lines.append(f"{'threshold':<32}{'words over it':>16}{'contexts with any':>20}")
        for literal, kinds in meta["intensity_shares"].items():
            for kind, row in kinds.items():
                label = literal if kind == "literal" else f"{row['threshold']:.4g} matched to {literal}"
                lines.append(f"{label:<32}{100 * row['words']:>14.1f} %{100 * row['contexts']:>18.1f} %")
    return "\n".join(lines)
