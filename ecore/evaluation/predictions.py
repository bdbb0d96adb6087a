"""The predictions file: JSON lines, one object per sample, from which every number of a report can be
computed again.

Only ``prediction`` and ``reference`` are needed to read one (:func:`evaluate_file`); what E-CORE writes has

- ``conv_id``, ``turn`` and ``context``, the turns before; ``reference``, the human response;
  ``prediction``, the answer;
- ``reference_tokens`` and ``prediction_tokens``, their words with single spaces between them: the reference's as the
  prepared data has them, the answer's as the model generated them (missing with a pre-trained backbone, which
  generates subwords). Where a record has both, words are counted from these and not from the texts, so a program that
  changes a text should leave them out;
- ``emotion``, the true emotion, and ``predicted_emotion``, the argmax of h^m;
- ``emotions``: [name, probability] of the five highest of Softmax(h_emo);
  (these two are missing where the model perceives no emotions, strategy "none");
- ``relevant``: the emotions of V' by falling h_emo (hard strategy only);
- ``nll``: the reference's summed negative log-likelihood in nats, without label smoothing, and its
  ``tokens``, EOS counted; ``context_words``, the context's, ``[CLS]`` not counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ecore.data.batches import Split
from ecore.data.text import tokenize
from ecore.data.vocabulary import UNK, Vocabulary
from ecore.errors import InputError
from ecore.evaluation.bleu import bleu_4
from ecore.evaluation.multi_emotion import multi_emotion_recall, read_multi_emotion
from ecore.files import atomic_path, expect_file, numbered_lines, parse_json
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.metrics import accuracy, distinct, mean_length, repetition
from ecore.model.outputs import expect_finite
from ecore.progress import tqdm

if TYPE_CHECKING:
    from ecore.model.base import EmpatheticModel

TOP_EMOTIONS = 5
TOKENS = ("prediction_tokens", "reference_tokens")

Record = dict[str, Any]


@torch.no_grad()
def predict(
    model: EmpatheticModel,
    split: Split,
    decoding: Decoding | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    progress: bool = True,
) -> list[Record]:
    """Score and answer the first ``limit`` samples of ``split`` (or all), as records of the predictions file.

    Samples are batched by length, the longest first, so that too large a batch fails at once; the records
    come in the split's order. The model is put in eval mode and works where its weights are.

    Raises:
        InputError: no samples, or a batch size under 1; or NLTK is missing and the vocabulary lacks a word of a
            reference.
    """
    count = len(split) if limit is None else min(limit, len(split))
    if count < 1 or batch_size < 1:
        name = "limit" if count < 1 else "batch_size"
        raise InputError(f"{name}: expected at least 1, got {count if count < 1 else batch_size}")
    model.eval()
    vocabulary = model.vocabulary
    references = None
    if isinstance(vocabulary, Vocabulary):  # before the work, for it may need a package
        references = [_reference_tokens(split, sample, vocabulary) for sample in range(count)]
    split = model.view(split, progress)
    order = np.lexsort((split.response_lengths[:count], split.context_lengths[:count]))[::-1]
    records: list[Record] = [{}] * count
    with tqdm(total=count, desc="evaluate", unit=" samples", disable=None if progress else True) as bar:
        for begin in range(0, count, batch_size):
            samples = order[begin : begin + batch_size]
            batch = split.batch(samples).to(model.device)
            scores = model.score(batch)
            expect_finite(scores.nll, "losses of responses")
            answers = generate(model, batch, decoding, encoding=scores.encoding)
            perceived = _perceived(model, scores.encoding)
            nll, tokens, words = (t.tolist() for t in (scores.nll, scores.tokens, batch.lengths - 1))
            for row, sample in enumerate(samples.tolist()):
                text = split.texts(sample)
                tokenized = {}
                if references is not None:
                    spoken = " ".join(vocabulary.decode(answers[row]))
                    tokenized = {"reference_tokens": references[sample], "prediction_tokens": spoken}
                records[sample] = {
                    "conv_id": text["conv_id"],
                    "turn": text["turn"],
                    "context": text["context"],
                    "reference": text["response"],
                    "prediction": vocabulary.text(answers[row]),
                    **tokenized,
                    "emotion": text["emotion"],
                    **perceived[row],
                    "nll": nll[row],
                    "tokens": tokens[row],
                    "context_words": words[row],
                }
            bar.update(len(samples))
    return records


def _reference_tokens(split: Split, sample: int, vocabulary: Vocabulary) -> str:
    """The words of a response with spaces between them: of its text where the vocabulary lacks one."""
    ids = split.response(sample)
    return " ".join(tokenize(split.texts(sample)["response"]) if UNK in ids else vocabulary.decode(ids))


def _perceived(model: EmpatheticModel, encoding: Any) -> list[Record]:
    """The emotions of every row, as the predictions file has them."""
    perceived = encoding.perceived
    if perceived is None:
        return [{} for _ in encoding.memory]
    names = model.vocabulary.emotions
    probability = perceived.emotion_attention.float().softmax(-1).cpu()
    ranked = perceived.emotion_attention.float().argsort(dim=-1, descending=True, stable=True).tolist()
    rows = []
    for row, main in enumerate(perceived.main_logits.argmax(-1).tolist()):
        top = [[names[i], round(float(probability[row, i]), 6)] for i in ranked[row][:TOP_EMOTIONS]]
        rows.append({"predicted_emotion": names[main], "emotions": top})
        if model.config.strategy == "hard":
            rows[row]["relevant"] = [names[i] for i in ranked[row] if perceived.relevant[row, i]]
    return rows


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write ``records`` to ``path``, one JSON object a line, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_predictions(
    model: EmpatheticModel,
    split: Split,
    path: Path | str,
    decoding: Decoding | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    progress: bool = True,
) -> list[Record]:
    """:func:`predict`, and the records to ``path``; its folder must exist.

    Raises:
        InputError: as :func:`predict`, or ``path`` is a folder or in none; found out before the work.
    """
    path = Path(path)
    expect_file(path)
    records = predict(model, split, decoding, batch_size, limit, progress)
    write_records(path, records)
    return records


def read_predictions(path: Path | str) -> list[Record]:
    """Anybody's predictions: JSON lines with the texts ``prediction`` and ``reference``; blank lines are
    skipped.

    Raises:
        InputError: the file is missing, unreadable or empty; a line that is no such object; ``emotion`` and
            ``predicted_emotion`` (texts) on some lines and not on others; ``prediction_tokens`` or
            ``reference_tokens`` that is no text.
    """
    path = Path(path)
    records: list[Record] = []
    for number, line in numbered_lines(path):
        record = parse_json(line, f"{path}:{number}")
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected an object, got {line.strip()[:40]}")
        records.append(record)
        with_emotions = has_emotions(records[0])
        if has_emotions(record) != with_emotions:
            wanted = "as" if with_emotions else "to be missing as"
            raise InputError(
                f"{path}:{number}: expected 'emotion' and 'predicted_emotion' {wanted} on the first line"
            )
        for name in ("prediction", "reference", "emotion", "predicted_emotion")[: 4 if with_emotions else 2]:
            if not isinstance(record.get(name), str):
                found = f"got {record[name]!r}" if name in record else "it is missing"
                raise InputError(f"{path}:{number}: expected {name!r} to be text, {found}")
        for name in TOKENS:
            if not isinstance(record.get(name, ""), str):
                expected = f"text, words with spaces between them, got {record[name]!r}"
                raise InputError(f"{path}:{number}: expected {name!r} to be {expected}")
    if not records:
        raise InputError(f"{path}: no predictions in it; expected JSON lines")
    return records


def has_emotions(record: Record) -> bool:
    """Return True where a record has the true and the predicted emotion."""
    return "emotion" in record and "predicted_emotion" in record


def evaluate_file(path: Path | str, multi_emotion: Path | str | None = None) -> Record:
    """Count what a predictions file allows: ``samples`` and :func:`text_metrics`; with a label file
    ``multi_emotion`` also :func:`~ecore.evaluation.multi_emotion.multi_emotion_recall`.

    Raises:
        InputError: see :func:`read_predictions` and, with a label file, the functions of that module.
    """
    records = read_predictions(path)
    result = {"samples": len(records), **text_metrics(records)}
    if multi_emotion is not None:
        labelled = [r for r in records if has_emotions(r) and isinstance(r.get("conv_id"), str)]
        true = {r["conv_id"]: r["emotion"] for r in labelled} if len(labelled) == len(records) else None
        labels = read_multi_emotion(multi_emotion, true_emotions=true)
        result["multi_emotion"] = multi_emotion_recall(records, labels)
    return result


def text_metrics(records: Sequence[Record]) -> Record:
    """``dist_1``, ``dist_2``, ``rep_3`` and ``mean_length`` of the predictions, and their BLEU-4
    (:func:`ecore.evaluation.bleu.bleu_4`); ``accuracy`` where the records have emotions; the first four of the
    references as ``human``. Words are those of ``prediction_tokens`` and ``reference_tokens`` where a record has both,
    else those of :func:`ecore.data.text.tokenize`.

    Raises:
        InputError: NLTK is missing, and words have to be found in a text that is not plain.
    """
    predictions, references = (_words(records, name) for name in ("prediction", "reference"))
    result = _counted(predictions) | bleu_4(predictions, references)
    if has_emotions(records[0]):
        result["accuracy"] = accuracy(
            [record["predicted_emotion"] for record in records], [record["emotion"] for record in records]
        )
    return {**result, "human": _counted(references)}


def _words(records: Sequence[Record], name: str) -> list[list[str]]:
    return [
        record[f"{name}_tokens"].split() if all(t in record for t in TOKENS) else tokenize(record[name])
        for record in records
    ]


def _counted(responses: Sequence[Sequence[str]]) -> Record:
    return {
        "dist_1": distinct(responses, 1),
        "dist_2": distinct(responses, 2),
        "rep_3": repetition(responses, 3),
        "mean_length": mean_length(responses),
    }
