"""Making a prepared folder (:mod:`ecore.data.prepared`) of a corpus: everything that training reads, computed once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ecore.data.batches import LISTENER, MAX_CONTEXT_WORDS, MAX_RESPONSE_WORDS, SPEAKER, SplitArrays
from ecore.data.concepts import MOST_CONCEPTS, related_words, select_related
from ecore.data.corpus import Conversation, Corpus, read_corpus
from ecore.data.embeddings import coverage, load_vectors
from ecore.data.intensity import expect_source, with_floor, word_intensity
from ecore.data.prepared import FORMAT, SPLITS, write_meta, write_split, write_words
from ecore.data.statistics import intensity_statistics, split_statistics
from ecore.data.text import tokenize
from ecore.data.vocabulary import PAD, VOCABULARIES, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.files import expect_new_folder, new_folder
from ecore.progress import tqdm


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
    """Prepare the corpus in folder ``data`` as folder ``out``, and return ``meta.json``.

    ``out`` appears when all is done, or not at all. :func:`ecore.data.statistics.describe` describes the result
    to people.

    Args:
        data: folder with ``train``, ``valid`` and ``test`` (:func:`ecore.data.corpus.read_corpus`).
        out: folder to make; it must not hold anything yet.
        glove: files of word vectors, side by side (:func:`ecore.data.embeddings.load_vectors`).
        intensity: source of word intensities, with its ``intensity_file`` and ``intensity_floor``
            (:func:`ecore.data.intensity.word_intensity`, :func:`~ecore.data.intensity.with_floor`).
        vocabulary: ``literature``, every word of contexts, responses and situations of all splits; or ``train``, those
            that occur at least ``min_count`` times in the training split.
        relations: file of commonsense relations (:func:`ecore.data.concepts.related_words`).
        skip_bad: skip and count bad lines of the corpus.

    Raises:
        InputError: anything wrong with the input, or ``out`` holds something.
    """
    out = Path(out)
    expect_new_folder(out)
    _check_words(vocabulary, min_count)
    _check_files((*glove, intensity_file, relations))
    expect_source(intensity, intensity_file)

    corpus = read_corpus(data, skip_bad)
    words = _tokenized(corpus, progress)
    literature = vocabulary == "literature"
    counts = _counted(words, SPLITS if literature else ("train",))
    known = Vocabulary.from_counts(counts, corpus.emotions, 1 if literature else min_count)
    bare = word_intensity(known.words, intensity, intensity_file)
    floored = with_floor(bare, intensity_floor)
    vectors = load_vectors(glove, known.words, progress) if glove else None
    tables = WordTables(torch.from_numpy(floored), *_related(relations, known, bare))

    splits: dict[str, Any] = {}
    with new_folder(out) as folder:
        for name in SPLITS:
            conversations: list[Conversation] = getattr(corpus, name)
            arrays, truncated = _numbered(name, conversations, words[name], known, tables, progress)
            write_split(folder, name, arrays)
            splits[name] = split_statistics(arrays) | {"truncated_contexts": truncated}
            if name == "train":
                passing = intensity_statistics(arrays, bare, floored)
        write_words(folder, known, tables, vectors)
        meta = {
            "format": FORMAT,
            "vocabulary": vocabulary,
            "vocabulary_fingerprint": known.fingerprint,
            "vocabulary_size": len(known),
            "min_count": None if literature else min_count,
            "intensity": intensity,
            "intensity_file": None if intensity_file is None else Path(intensity_file).name,
            "intensity_floor": intensity_floor,
            **passing,
            "relations": None if relations is None else Path(relations).name,
            "glove": [Path(file).name for file in glove],
            "splits": splits,
            "skipped_lines": corpus.skipped,
        }
        if vectors is not None:
            occurrences = np.array([counts[word] for word in known.words])
            types, tokens = coverage(vectors, occurrences)
            meta["glove_coverage"] = {"types": types, "tokens": tokens}
        return write_meta(folder, meta)


def _check_words(vocabulary: str, min_count: int) -> None:
    if vocabulary not in VOCABULARIES:
        raise InputError(f"vocabulary: expected one of {', '.join(VOCABULARIES)}, got {vocabulary!r}")
    if min_count < 1:
        raise InputError(f"min_count: expected at least 1, got {min_count}")


def _check_files(files: Iterable[Path | str | None]) -> None:
    for file in files:
        if file is not None and not Path(file).is_file():
            raise InputError(f"{file}: no such file")


def _counted(words: Mapping[str, Sequence[_Words]], splits: Sequence[str]) -> Counter[str]:
    """Return how often each word occurs in ``splits``."""
    counts: Counter[str] = Counter()
    for name in splits:
        for conversation in words[name]:
            for tokens in (conversation.situation, *conversation.turns):
                counts.update(tokens)
    return counts


def _related(
    relations: Path | str | None, vocabulary: Vocabulary, intensity: npt.NDArray[np.float32]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each word's related words and their scores, both [V, R]; R is 0 without relations."""
    if relations is None:
        shape = (len(vocabulary), 0)
        return torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    words, scores = related_words(relations, vocabulary.words, intensity)
    return torch.from_numpy(words), torch.from_numpy(scores)


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


def _numbered(
    name: str,
    conversations: Sequence[Conversation],
    words: Sequence[_Words],
    vocabulary: Vocabulary,
    tables: WordTables,
    progress: bool,
) -> tuple[SplitArrays, int]:
    """Return a split's arrays, and how many contexts were cut.

    Raises:
        InputError: a response is too long.
    """
    flat: list[int] = []
    states: list[int] = []
    samples: list[tuple[int, int, int, int, int, int]] = []
    concepts: list[list[int]] = []
    truncated = 0
    emotions = {emotion: i for i, emotion in enumerate(vocabulary.emotions)}
    rows = zip(conversations, words, strict=True)
    bar = tqdm(rows, desc=name, total=len(words), unit=" conversations", disable=not progress)
    for number, (conversation, spoken) in enumerate(bar):
        first = len(flat)
        for turn, tokens in enumerate(spoken.turns):
            begin = len(flat)
            flat += vocabulary.encode(tokens)
            states += [LISTENER if turn % 2 else SPEAKER] * len(tokens)
            if turn % 2 == 0:
                continue
            if len(tokens) > MAX_RESPONSE_WORDS:
                raise InputError(
                    f"{name}: conversation {conversation.conv_id}: a response of {len(tokens):,} words; "
                    f"expected at most {MAX_RESPONSE_WORDS:,}"
                )
            start = max(first, begin - MAX_CONTEXT_WORDS)
            truncated += start > first
            samples.append((start, begin, len(flat), emotions[conversation.emotion], number, turn))
            concepts.append(select_related(flat[start:begin], tables))
    most_related = MOST_CONCEPTS if tables.related.shape[1] else 0
    related = np.full((len(samples), most_related), PAD, dtype=np.int32)
    for row, ids in zip(related, concepts, strict=True):
        row[: len(ids)] = ids
    # JSON escapes all but ASCII, so a character is a byte.
    texts = [_json_line(conversation).encode("ascii") for conversation in conversations]
    arrays = SplitArrays(
        words=np.array(flat, dtype=np.int32),
        states=np.array(states, dtype=np.uint8),
        samples=np.array(samples, dtype=np.int64),
        concepts=related,
        text_offsets=np.cumsum([0] + [len(text) for text in texts], dtype=np.int64),
        texts=np.frombuffer(b"".join(texts), dtype=np.uint8),
    )
    return arrays, truncated


def _json_line(conversation: Conversation) -> str:
    names = ("conv_id", "emotion", "situation", "turns")
    return json.dumps({name: getattr(conversation, name) for name in names}) + "\n"
