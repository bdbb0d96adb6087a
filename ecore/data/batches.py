"""Tensors for the model: samples of a split, or raw text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecore.data.concepts import select_related
from ecore.data.text import tokenize
from ecore.data.vocabulary import CLS, EOS, PAD, Vocabulary
from ecore.data.word_tables import WordTables
from ecore.errors import InputError
from ecore.files import parse_json

MAX_CONTEXT_WORDS = 512
"""Words of a context that are kept, ``[CLS]`` not counted: the latest ones."""
MAX_RESPONSE_WORDS = 4095
"""Words that a response may have, EOS not counted; a longer one is refused."""
NO_STATE, SPEAKER, LISTENER, CLS_STATE, RELATED_STATE = range(5)
"""Dialogue states of a word (Eq. 1); the model itself gives related words their own."""
POOL_BATCHES = 50
"""Batches whose samples are sorted by length together: a larger pool pads less and mixes less."""


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


class SplitArrays(NamedTuple):
    """The files of one split; C is 0 where the data has no relations.

    Attributes:
        words: int32 [W], the words of all conversations in a row.
        states: uint8 [W], who said each.
        samples: int64 [n, 6], where a context starts, where its response starts and ends in ``words``, the emotion, the
            conversation and the turn.
        concepts: int32 [n, C], related words of each context, padded with PAD.
        text_offsets: int64 [conversations + 1], the byte of ``texts`` at which each conversation starts.
        texts: uint8, the conversations as written, JSON lines.
    """

    words: npt.NDArray[Any]
    states: npt.NDArray[Any]
    samples: npt.NDArray[Any]
    concepts: npt.NDArray[Any]
    text_offsets: npt.NDArray[Any]
    texts: npt.NDArray[np.uint8]


class Split:
    """The samples of one split: every listener turn with all turns before it.

    A conversation's words lie side by side in one flat array, so a context is the slice of it that ends where
    the response begins.
    """

    def __init__(self, name: str, arrays: SplitArrays, emotions: Sequence[str]) -> None:
        self.name, self.arrays = name, arrays
        self._emotions = tuple(emotions)
        columns = np.ascontiguousarray(arrays.samples.T)
        self._start, self._response, self._end, self._emotion, self._conversation, self._turn = columns
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
        last = len(self.arrays.words) - 1

        lengths = begin - start + 1
        columns = np.arange(lengths.max())
        inside = columns < lengths[:, None]
        # Column 0 is [CLS]: it and padded places read some word that is then overwritten.
        source = np.clip(start[:, None] + columns - 1, 0, last)
        context = np.where(inside, self.arrays.words[source], PAD)
        state = np.where(inside, self.arrays.states[source], NO_STATE)
        context[:, 0], state[:, 0] = CLS, CLS_STATE

        words = end - begin
        columns = np.arange(words.max() + 1)
        source = np.minimum(begin[:, None] + columns, last)
        response = np.where(columns < words[:, None], self.arrays.words[source], PAD)
        response[np.arange(len(rows)), words] = EOS

        concepts = self.arrays.concepts[rows]
        concepts = concepts[:, : (concepts != PAD).sum(1).max(initial=0)]
        arrays = (context, state, lengths, concepts, response, self._emotion[rows])
        return Batch(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))

    def dialogues(self) -> list[tuple[int, int]]:
        """Return where each conversation starts and where its last response ends in the arrays' words."""
        last = {
            number: (begin, end)  # the samples of a conversation come in the order of its turns
            for number, begin, end in zip(
                self._conversation.tolist(), self._start.tolist(), self._end.tolist(), strict=True
            )
        }
        return list(last.values())

    def response(self, index: int) -> list[int]:
        """Ids of the response's words of sample ``index``, without EOS."""
        words: list[int] = self.arrays.words[self._response[index] : self._end[index]].tolist()
        return words

    def texts(self, index: int) -> dict[str, Any]:
        """Sample ``index`` as written: ``conv_id``, ``turn``, ``context``, ``response``, ``emotion``."""
        conversation, turn = int(self._conversation[index]), int(self._turn[index])
        begin, end = self.arrays.text_offsets[conversation : conversation + 2]
        where = f"{self.name}: conversation {conversation}"
        record = parse_json(self.arrays.texts[begin:end].tobytes(), where)
        return {
            "conv_id": record["conv_id"],
            "turn": turn,
            "context": record["turns"][:turn],
            "response": record["turns"][turn],
            "emotion": self._emotions[int(self._emotion[index])],
        }


class Widths(NamedTuple):
    """Widths of a batch's contexts, responses and related words, padding counted."""

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
        self._concept_counts = (np.asarray(split.arrays.concepts) != PAD).sum(1)
        self.concepts = int(self._concept_counts.max(initial=0))
        arrays = split.arrays
        # A word of padding at the end, for what lies outside of a sample.
        self._words = copy(np.append(arrays.words, PAD).astype(np.int64))
        self._states = copy(np.append(arrays.states, NO_STATE).astype(np.int64))
        columns = (
            split._start - 1,  # where [CLS] would be
            split.context_lengths,
            split._response,
            split._end - split._response,
            split._emotion,
        )
        self._samples = copy(np.concatenate([np.stack(columns, 1), arrays.concepts], 1).astype(np.int64))
        """[n, 5 + C]: a sample's places and lengths, emotion and related words, to be gathered at once."""
        # Made once, for the widest batch and its padding: recordings read it.
        self._columns = torch.arange(2 * (MAX_RESPONSE_WORDS + 1), device=self._device)

    def batch(self, indices: npt.ArrayLike) -> Batch:
        """As :meth:`Split.batch`, on the device; the host does not wait for it."""
        return self.gather(self.send(indices), self.widths(indices))

    def widths(self, indices: npt.ArrayLike) -> Widths:
        """Return the widths of the samples of ``indices``, from the host: the device is not asked."""
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

        No value is read on the host: it can be captured, and then gathers whatever ``rows`` holds.
        """
        samples = self._samples[rows]  # [B, 5 + C]
        start, lengths, begin, words = samples[:, :4, None].unbind(1)  # [B, 1] each
        columns, padding = self._columns[: widths.context], len(self._words) - 1
        source = (start + columns).masked_fill_(columns >= lengths, padding)  # [B, M]
        context, state = self._words[source], self._states[source]
        context[:, 0], state[:, 0] = CLS, CLS_STATE

        columns = self._columns[: widths.response]
        source = (begin + columns).masked_fill_(columns > words, padding)  # [B, T]
        response = self._words[source].scatter_(1, words, EOS)
        concepts = samples[:, 5 : 5 + widths.concepts]
        return Batch(context, state, lengths[:, 0], concepts, response, samples[:, 4])


def resident(split: Any, device: torch.device | str) -> Any:
    """Return a copy of ``split`` on ``device``, or ``split`` itself if it is not a :class:`Split`."""
    return ResidentSplit(split, device) if isinstance(split, Split) else split


def length_buckets(
    split: Split, batch_size: int, seed: int, epoch: int, limit: int | None = None
) -> list[npt.NDArray[np.int64]]:
    """Return every sample once, or the first ``limit``, in batches of similar length and random order.

    They are the same for the same seed and epoch.

    Samples are dealt at random into pools of :data:`POOL_BATCHES` batches, sorted there by the lengths of
    context and response, and cut, so that batches change from epoch to epoch. A short batch is kept.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(split) if limit is None else min(limit, len(split)))
    batches: list[npt.NDArray[np.int64]] = []
    for begin in range(0, len(order), batch_size * POOL_BATCHES):
        pool = order[begin : begin + batch_size * POOL_BATCHES]
        pool = pool[np.lexsort((split.response_lengths[pool], split.context_lengths[pool]))]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]
