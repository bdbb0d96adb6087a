"""Tensors for the model, from a prepared folder or from raw text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecore.data.concepts import select_related
from ecore.data.text import tokenize
from ecore.data.vocabulary import CLS, EOS, PAD, Vocabulary
from ecore.errors import InputError
from ecore.files import read_json

FORMAT = 1
"""Version of the prepared folder; another one is refused."""
SPLITS = ("train", "valid", "test")
MAX_CONTEXT_WORDS = 512
"""Words of a context that are kept, ``[CLS]`` not counted: the latest ones."""
MAX_RESPONSE_WORDS = 4095
"""Words that a response may have, EOS not counted; a longer one is refused."""
NO_STATE, SPEAKER, LISTENER, CLS_STATE, RELATED_STATE = range(5)
"""Dialogue states of a word (Eq. 1); the model itself gives related words their own."""
POOL_BATCHES = 50
"""Batches whose samples are sorted by length together: a larger pool pads less and mixes less."""


class WordTables(NamedTuple):
    """What is known of every word, beside its embedding; torch tensors.

    ``intensity`` float32 [V]: c of Section 3.2. ``related`` int32 [V, R]: related words, best first,
    PAD-padded; R may be 0. ``related_score`` float32 [V, R]: their scores, 0 where padded.
    """

    intensity: Tensor
    related: Tensor
    related_score: Tensor


class Batch(NamedTuple):
    """B samples as int64 tensors, padded with PAD to the longest.

    ``context`` [B, M]: ``[CLS]``, then the words of all turns. ``state`` [B, M]: 0 padding, 1 speaker, 2
    listener, 3 ``[CLS]``. ``lengths`` [B]: words of the context, ``[CLS]`` counted. ``concepts`` [B, C]:
    related words; C is 0 where there are none. ``response`` [B, T]: the target, ending with EOS. ``emotion``
    [B].
    """

    context: Tensor
    state: Tensor
    lengths: Tensor
    concepts: Tensor
    response: Tensor
    emotion: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def context_batch(
    contexts: Sequence[Sequence[str]],
    vocabulary: Vocabulary,
    tables: WordTables,
    max_words: int = MAX_CONTEXT_WORDS,
) -> Batch:
    """A batch of raw contexts, each a list of turns, the speaker's first.

    Of a longer context the last ``max_words`` words are kept. ``response`` is [B, 0] and ``emotion`` zeros.

    Raises:
        InputError: no context, or a context without turns.
    """
    if not contexts or not all(contexts):
        raise InputError("expected at least one context, and at least one turn in each")
    host = WordTables(*(table.cpu() for table in tables))
    words, states, concepts = [], [], []
    for turns in contexts:
        ids = [vocabulary.encode(tokenize(turn)) for turn in turns]
        flat = [i for turn in ids for i in turn][-max_words:]
        state = [SPEAKER if t % 2 == 0 else LISTENER for t, turn in enumerate(ids) for _ in turn][-max_words:]
        words.append([CLS, *flat])
        states.append([CLS_STATE, *state])
        concepts.append(select_related(flat, host))
    return Batch(
        context=_padded(words),
        state=_padded(states),
        lengths=torch.tensor([len(row) for row in words]),
        concepts=_padded(concepts),
        response=torch.zeros(len(contexts), 0, dtype=torch.int64),
        emotion=torch.zeros(len(contexts), dtype=torch.int64),
    )


def _padded(rows: list[list[int]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.int64)


class Split:
    """The samples of one split: every listener turn with all turns before it.

    A conversation's words lie side by side in one flat array, so a context is the slice of it that ends where
    the response begins.
    """

    def __init__(self, folder: Path, name: str, emotions: Sequence[str]) -> None:
        self.name = name
        self._emotions = tuple(emotions)
        self._words = _load(folder, f"{name}.words.npy", 1)
        self._states = _load(folder, f"{name}.states.npy", 1)
        samples = _load(folder, f"{name}.samples.npy", 2)
        self._concepts = _load(folder, f"{name}.concepts.npy", 2)
        self._text_offsets = _load(folder, f"{name}.text_offsets.npy", 1)
        text_file = folder / f"{name}.texts.jsonl"
        try:
            self._texts = np.memmap(text_file, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise _broken(text_file, error) from None
        if len(samples) == 0 or samples.shape[1] != 6:
            raise _broken(folder / f"{name}.samples.npy", f"shape {samples.shape}")
        columns = np.ascontiguousarray(samples.T)
        self._start, self._response, self._end, self._emotion, self._conversation, self._turn = columns
        if (
            self._end.max() > min(len(self._words), len(self._states))
            or len(self._concepts) != len(samples)
            or self._conversation.max() + 2 > len(self._text_offsets)
            or self._text_offsets[-1] != len(self._texts)
        ):
            raise _broken(folder / f"{name}.*", "its arrays do not fit together")
        self.context_lengths = self._response - self._start + 1
        """Words of each context, ``[CLS]`` counted."""
        self.response_lengths = self._end - self._response + 1
        """Words of each response, EOS counted."""

    def __len__(self) -> int:
        return len(self._start)

    def batch(self, indices: npt.ArrayLike) -> Batch:
        """The samples of ``indices``, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        start, begin, end = self._start[rows], self._response[rows], self._end[rows]
        last = len(self._words) - 1

        lengths = begin - start + 1
        columns = np.arange(lengths.max())
        inside = columns < lengths[:, None]
        # Column 0 is [CLS]: it and padded places read some word that is then overwritten.
        source = np.clip(start[:, None] + columns - 1, 0, last)
        context = np.where(inside, self._words[source], PAD)
        state = np.where(inside, self._states[source], NO_STATE)
        context[:, 0], state[:, 0] = CLS, CLS_STATE

        words = end - begin
        columns = np.arange(words.max() + 1)
        source = np.minimum(begin[:, None] + columns, last)
        response = np.where(columns < words[:, None], self._words[source], PAD)
        response[np.arange(len(rows)), words] = EOS

        concepts = self._concepts[rows]
        concepts = concepts[:, : (concepts != PAD).sum(1).max(initial=0)]
        arrays = (context, state, lengths, concepts, response, self._emotion[rows])
        return Batch(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))

    def response(self, index: int) -> list[int]:
        """Ids of the response's words of sample ``index``, without EOS."""
        words: list[int] = self._words[self._response[index] : self._end[index]].tolist()
        return words

    def texts(self, index: int) -> dict[str, Any]:
        """Sample ``index`` as written: ``conv_id``, ``turn``, ``context``, ``response``, ``emotion``."""
        conversation, turn = int(self._conversation[index]), int(self._turn[index])
        begin, end = self._text_offsets[conversation : conversation + 2]
        record = json.loads(self._texts[begin:end].tobytes())
        return {
            "conv_id": record["conv_id"],
            "turn": turn,
            "context": record["turns"][:turn],
            "response": record["turns"][turn],
            "emotion": self._emotions[int(self._emotion[index])],
        }


class Widths(NamedTuple):
    """How wide a batch's contexts, responses and related words are, padding counted."""

    context: int
    response: int
    concepts: int


class ResidentSplit:
    """A split whose arrays lie on a device: batches are gathered there, and only the samples' numbers are sent.

    Attributes:
        concepts: the most related words that a sample has.
    """

    def __init__(self, split: Split, device: torch.device | str) -> None:
        """Copy what batches need; for all of EmpatheticDialogues some 15 MB."""

        def copy(array: npt.NDArray[Any]) -> Tensor:
            # The files are mapped read-only, which torch warns of.
            return torch.from_numpy(np.array(array)).to(device)

        self._split, self._device = split, torch.device(device)
        self._concept_counts = (np.asarray(split._concepts) != PAD).sum(1)
        self.concepts = int(self._concept_counts.max(initial=0))
        self._words, self._states, self._concepts = map(copy, (split._words, split._states, split._concepts))
        self._start, self._response, self._end, self._emotion = (
            copy(column.astype(np.int64))
            for column in (split._start, split._response, split._end, split._emotion)
        )

    def batch(self, indices: npt.ArrayLike) -> Batch:
        """As :meth:`Split.batch`, on the device; the host does not wait for it."""
        return self.gather(self.send(indices), self.widths(indices))

    def widths(self, indices: npt.ArrayLike) -> Widths:
        """How wide the samples of ``indices`` are; known on the host, so that nobody has to ask the device."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Widths(
            int(self._split.context_lengths[chosen].max()),
            int(self._split.response_lengths[chosen].max()),
            int(self._concept_counts[chosen].max(initial=0)),
        )

    def tokens(self, indices: npt.ArrayLike) -> int:
        """Words of the responses of ``indices``, EOS counted; likewise."""
        return int(self._split.response_lengths[np.asarray(indices, dtype=np.int64)].sum())

    def send(self, indices: npt.ArrayLike) -> Tensor:
        """``indices`` on the device, int64; the host does not wait."""
        rows = torch.from_numpy(np.array(indices, dtype=np.int64))
        return rows.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else rows

    def gather(self, rows: Tensor, widths: Widths) -> Batch:
        """The samples of ``rows``, int64 [B] on the device, padded to ``widths``, which are theirs or more.

        Of tensors' values it asks nothing: it can be captured, and then gathers whatever ``rows`` holds.
        """
        start, begin, end = self._start[rows], self._response[rows], self._end[rows]
        last = len(self._words) - 1

        lengths = begin - start + 1
        columns = torch.arange(widths.context, device=rows.device)
        source = (start[:, None] + columns - 1).clamp(0, last)
        inside, first = columns < lengths[:, None], columns == 0
        context = torch.where(inside, self._words[source].long(), PAD)
        state = torch.where(inside, self._states[source].long(), NO_STATE)
        context, state = torch.where(first, CLS, context), torch.where(first, CLS_STATE, state)

        words = (end - begin)[:, None]
        columns = torch.arange(widths.response, device=rows.device)
        source = (begin[:, None] + columns).clamp(max=last)
        response = torch.where(columns < words, self._words[source].long(), PAD)
        response = torch.where(columns == words, EOS, response)
        concepts = self._concepts[rows, : widths.concepts].long()
        return Batch(context, state, lengths, concepts, response, self._emotion[rows])


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
        if not (folder / "meta.json").is_file():
            raise InputError(f"{folder}: not a prepared folder (no meta.json); make one with `ecore prepare`")
        self.meta = read_json(folder / "meta.json")
        version = self.meta.get("format") if isinstance(self.meta, dict) else None
        if version != FORMAT:
            raise InputError(
                f"{folder / 'meta.json'}: folder of format {version}, expected {FORMAT}; prepare it again"
            )
        for key in ("vocabulary_fingerprint", "intensity", "thresholds", "glove"):
            if key not in self.meta:
                raise _broken(folder / "meta.json", f"no {key}")
        self.vocabulary = Vocabulary.load(folder / "vocabulary.json")
        if self.vocabulary.fingerprint != self.meta["vocabulary_fingerprint"]:
            raise InputError(
                f"{folder / 'vocabulary.json'}: not the vocabulary that the folder was prepared with"
            )
        names = {"intensity": 1, "related": 2, "related_score": 2}
        tables = {name: _load(folder, f"{name}.npy", ndim) for name, ndim in names.items()}
        self.embeddings = _load(folder, "embeddings.npy", 2) if self.meta["glove"] else None
        sized = tables if self.embeddings is None else {**tables, "embeddings": self.embeddings}
        for name, array in sized.items():
            if len(array) != len(self.vocabulary):
                raise _broken(folder / f"{name}.npy", f"{len(array)} rows for {len(self.vocabulary)} words")
        self.tables = WordTables(**{name: torch.from_numpy(array.copy()) for name, array in tables.items()})
        self.train, self.valid, self.test = (Split(folder, name, self.vocabulary.emotions) for name in SPLITS)
        return self

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


def length_buckets(split: Split, batch_size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
    """Every sample once, in batches of similar length and random order; the same for the same seed and epoch.

    Samples are dealt at random into pools of :data:`POOL_BATCHES` batches, sorted there by the lengths of
    context and response, and cut, so that batches change from epoch to epoch. A short batch is kept.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(split))
    batches: list[npt.NDArray[np.int64]] = []
    for begin in range(0, len(order), batch_size * POOL_BATCHES):
        pool = order[begin : begin + batch_size * POOL_BATCHES]
        pool = pool[np.lexsort((split.response_lengths[pool], split.context_lengths[pool]))]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def _load(folder: Path, name: str, ndim: int) -> npt.NDArray[Any]:
    path = folder / name
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _broken(path, error) from None
    if array.ndim != ndim:
        raise _broken(path, f"{array.ndim} dimensions, expected {ndim}")
    return array


def _broken(path: Path, why: object) -> InputError:
    reason = str(why).replace("\n", " ")
    return InputError(
        f"{path}: missing or damaged ({reason}); expected what `ecore prepare` wrote, prepare it again"
    )
