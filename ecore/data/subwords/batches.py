"""Batches of subwords, for a GPT-2 in place of the word-level encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecore.data.batches import Split
from ecore.data.subwords.alignment import Floats, WordIntensity
from ecore.data.subwords.vocabulary import SubwordVocabulary
from ecore.data.vocabulary import CLS, EOS, PAD
from ecore.errors import InputError
from ecore.progress import tqdm

_CHUNK = 2048  # turns tokenised at once


class SubwordBatch(NamedTuple):
    """B samples, padded to the longest: what :class:`ecore.data.batches.Batch` is for words.

    ``context`` int64 [B, M]: ``[CLS]``, then the subwords of all turns, EOS between turns. ``lengths`` [B]:
    subwords of the context, ``[CLS]`` counted; at least 2. ``intensity`` float32 [B, M]: c of each subword's
    word, 0 where padded. ``response`` [B, T]: the target, ending with EOS. ``emotion`` [B].
    """

    context: Tensor
    lengths: Tensor
    intensity: Tensor
    response: Tensor
    emotion: Tensor

    def to(self, device: torch.device | str) -> SubwordBatch:
        """The batch on ``device``."""
        return SubwordBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class TurnReader:
    """Turns of dialogues as subwords with their intensities.

    Args:
        table: float32 [W], the intensity of each of the vocabulary's words.
    """

    def __init__(self, vocabulary: SubwordVocabulary, table: Floats) -> None:
        self._vocabulary = vocabulary
        self._intensity = WordIntensity(vocabulary.words, table)
        self._separator = float(table[EOS])

    def read(self, turns: Sequence[str]) -> list[tuple[list[int], list[float]]]:
        """Ids and intensities of each turn, an EOS behind it, which has the intensity of the word EOS."""
        texts = [self._vocabulary.clean(turn) for turn in turns]
        return [
            ([*ids, EOS], [*self._intensity.subwords(text, spans), self._separator])
            for text, (ids, spans) in zip(texts, self._vocabulary.encode(texts), strict=True)
        ]


def context_batch(contexts: Sequence[Sequence[str]], reader: TurnReader, most: int) -> SubwordBatch:
    """A batch of raw contexts, each a list of turns; ``response`` is [B, 0] and ``emotion`` zeros.

    Of a longer context the last ``most`` subwords are kept.

    Raises:
        InputError: no context, or a context without turns.
    """
    if not contexts or not all(contexts):
        raise InputError("expected at least one context, and at least one turn in each")
    rows = []
    for turns in contexts:
        read = reader.read(turns)
        ids = [i for turn, _ in read for i in turn]
        values = [value for _, turn in read for value in turn]
        # The last EOS is the decoder's to take; a blank context keeps it, for GPT-2 cannot read nothing.
        stop = max(len(ids) - 1, 1)
        rows.append((ids[max(stop - most, 0) : stop], values[max(stop - most, 0) : stop]))
    lengths = torch.tensor([1 + len(ids) for ids, _ in rows])
    context = torch.full((len(rows), int(lengths.max())), PAD)
    intensity = torch.zeros(context.shape)
    context[:, 0] = CLS
    for row, (ids, values) in enumerate(rows):
        context[row, 1 : 1 + len(ids)] = torch.tensor(ids)
        intensity[row, 1 : 1 + len(ids)] = torch.tensor(values)
    empty = torch.zeros(len(rows), 0, dtype=torch.int64)
    return SubwordBatch(context, lengths, intensity, empty, torch.zeros(len(rows), dtype=torch.int64))


class SubwordSplit:
    """A split of the prepared data as subwords; reads like :class:`ecore.data.batches.Split`.

    The turns of all conversations lie side by side in one flat array, an EOS behind each, so a context and the
    response to it are two slices of it, with the EOS between them in neither.

    Args:
        split: gives the texts.
        reader: turns them into subwords.
        emotions: their names, in order.
        most: subwords of a context that are kept, ``[CLS]`` not counted: the latest ones.
        longest: subwords of a response at most, EOS counted.
        progress: show a progress bar.

    Raises:
        InputError: a response is longer.
    """

    def __init__(
        self,
        split: Split,
        reader: TurnReader,
        emotions: Sequence[str],
        most: int,
        longest: int,
        progress: bool = True,
    ) -> None:
        self.name = split.name
        self.texts = split.texts
        number = {name: i for i, name in enumerate(emotions)}
        turns: list[str] = []
        opening = 0  # the first turn of the conversation at hand
        samples: list[tuple[int, int, int]] = []
        for i in range(len(split)):
            text = split.texts(i)
            spoken = [*text["context"], text["response"]]
            known = turns[opening:]
            if spoken[: len(known)] != known:
                opening, known = len(turns), []
            turns += spoken[len(known) :]
            samples.append((opening, opening + len(text["context"]), number[text["emotion"]]))

        ids: list[npt.NDArray[np.int32]] = []
        intensity: list[Floats] = []
        starts = [0]
        with tqdm(
            total=len(turns), desc=f"{split.name}: subwords", unit=" turns", disable=not progress
        ) as bar:
            for begin in range(0, len(turns), _CHUNK):
                for tokens, values in reader.read(turns[begin : begin + _CHUNK]):
                    ids.append(np.array(tokens, dtype=np.int32))
                    intensity.append(np.array(values, dtype=np.float32))
                    starts.append(starts[-1] + len(tokens))
                    bar.update()
        self._ids, self._intensity = np.concatenate(ids), np.concatenate(intensity)
        first, turn, self._emotion = np.array(samples, dtype=np.int64).T
        place = np.array(starts)
        self._response, self._end = place[turn], place[turn + 1]
        # A blank context keeps its EOS, for GPT-2 cannot read nothing.
        self._stop = np.maximum(self._response - 1, place[first] + 1)
        self._start = np.maximum(place[first], self._stop - most)
        self.context_lengths = self._stop - self._start + 1
        """Subwords of each context, ``[CLS]`` counted."""
        self.response_lengths = self._end - self._response
        """Subwords of each response, EOS counted."""
        if self.response_lengths.max() > longest:
            sample = self.texts(int(self.response_lengths.argmax()))
            raise InputError(
                f"{split.name}: the response of turn {sample['turn']} of {sample['conv_id']} has "
                f"{self.response_lengths.max()} subwords, expected at most {longest}, which is what the backbone's "
                "positions leave room for"
            )

    def __len__(self) -> int:
        return len(self._start)

    def batch(self, indices: npt.ArrayLike) -> SubwordBatch:
        """The samples of ``indices``, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        last = len(self._ids) - 1

        lengths = self.context_lengths[rows]
        columns = np.arange(lengths.max())
        inside = columns < lengths[:, None]
        # Column 0 is [CLS]: it and padded places read some subword that is then overwritten.
        source = np.clip(self._start[rows][:, None] + columns - 1, 0, last)
        context = np.where(inside, self._ids[source], PAD)
        intensity = np.where(inside, self._intensity[source], np.float32(0.0))
        context[:, 0], intensity[:, 0] = CLS, 0.0

        sizes = self.response_lengths[rows]
        columns = np.arange(sizes.max())
        source = np.minimum(self._response[rows][:, None] + columns, last)
        response = np.where(columns < sizes[:, None], self._ids[source], PAD)
        return SubwordBatch(
            context=torch.from_numpy(context.astype(np.int64)),
            lengths=torch.from_numpy(lengths),
            intensity=torch.from_numpy(intensity),
            response=torch.from_numpy(response.astype(np.int64)),
            emotion=torch.from_numpy(self._emotion[rows]),
        )
