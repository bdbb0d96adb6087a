"""All measurements of a run on one split, as files and as a table to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecore import pretrained
from ecore.config import BASELINES
from ecore.data.prepared import SPLITS, PreparedData
from ecore.errors import InputError
from ecore.evaluation.bleu import INSTALL
from ecore.evaluation.multi_emotion import (
    RECALL_AT,
    format_multi_emotion,
    multi_emotion_recall,
    read_multi_emotion,
    split_emotions,
)
from ecore.evaluation.predictions import Record, has_emotions, predict, text_metrics, write_records
from ecore.evaluation.yardsticks import yardsticks as count_yardsticks
from ecore.files import expect_folder, make_folder, write_json
from ecore.generation.decoding import Decoding
from ecore.metrics import accuracy_by_emotion, accuracy_by_length, perplexity, recall_at
from ecore.precision import PRODUCTS, float32_products
from ecore.pretrained import data_folder, weights_file

EXTREMES = 3  # best and worst emotions of the printed table


def evaluate_run(
    run: Path | str,
    split: str = "test",
    data: Path | str | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    out: Path | str | None = None,
    limit: int | None = None,
    decoding: Decoding | None = None,
    yardsticks: bool = True,
    progress: bool = True,
    multi_emotion: Path | str | None = None,
    precision: str = "float32",
    checkpoint: str = "best",
    weights: str = "float32",
) -> dict[str, Any]:
    """Score and answer one split with a run's model, write the files, print the table.

    Args:
        run: the run's folder.
        split: train, valid or test.
        data: the prepared folder; default the one that the run was trained on.
        out: where ``metrics.json`` and ``predictions.jsonl`` go; default ``RUN/evaluation-SPLIT``.
        limit: only the first ``limit`` samples, for a quick look; the yardsticks are of the same samples.
        decoding: default greedy, at most 30 words: that of the literature's tables.
        yardsticks: count those too.
        multi_emotion: label file (:mod:`ecore.evaluation.multi_emotion`) whose dialogues' emotions are scored too.
        precision: "float32" or "tf32", of matrix products (:func:`ecore.precision.float32_products`).
        checkpoint: "best" or "last".
        weights: of answers, "float32", "bfloat16" or "int8"; losses are the model's own.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        InputError: a folder that is missing or damaged, an unknown split, or data prepared with another
        vocabulary.
    """
    run, decoding = Path(run), decoding or Decoding()
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if precision not in PRODUCTS:
        raise InputError(f"precision: expected one of {', '.join(PRODUCTS)}, got {precision!r}")
    pretrained.read_config(run)  # no run: to be said before where its scores would go
    out = Path(out) if out is not None else run / f"evaluation-{split}"
    expect_folder(out)
    model = pretrained.load(run, checkpoint, device)
    model.quantize(weights)
    prepared = PreparedData.load(data_folder(run) if data is None else data)
    if prepared.vocabulary.fingerprint != model.vocabulary.fingerprint:
        raise InputError(
            f"{prepared.folder}: prepared with another vocabulary ({prepared.vocabulary.fingerprint}); "
            f"expected the data that {run} was trained on ({model.vocabulary.fingerprint})"
        )
    chosen: Any = getattr(prepared, split)
    labels = None
    if multi_emotion is not None:  # before the work, for the file may be bad
        if limit is not None:
            raise InputError("--multi-emotion: needs the whole split; leave out --limit")
        if not model.config.perceives:
            raise InputError(f"--multi-emotion: {run} is of strategy none, which perceives no emotions")
        labels = read_multi_emotion(multi_emotion, prepared.vocabulary.emotions, split_emotions(chosen))
    make_folder(out)

    kind = model.device.type
    with float32_products(kind, precision):
        records = predict(model, chosen, decoding, batch_size, limit, progress)
    metrics = {
        "split": split,
        "checkpoint": weights_file(run, checkpoint).stem,
        "model": model.config.model,
        "strategy": model.config.strategy,
        "precision": "float32" if kind == "cpu" else precision,
        "vocabulary": {
            "kind": "subword" if model.config.backbone else prepared.meta["vocabulary"],
            "words": len(model.vocabulary),
            "fingerprint": prepared.vocabulary.fingerprint,
        },
        "decoding": asdict(decoding),
        "weights": weights,
        **run_metrics(records, model.vocabulary.emotions),
    }
    if labels is not None:
        metrics["multi_emotion"] = multi_emotion_recall(records, labels)
    if yardsticks:
        samples = np.arange(len(records))
        counted = count_yardsticks(prepared.train, chosen, prepared.vocabulary, samples)
        if model.config.backbone:  # the others are perplexities of words
            counted = {"naive_bayes_accuracy": counted["naive_bayes_accuracy"]}
        metrics["yardsticks"] = counted
    write_records(out / "predictions.jsonl", records)
    write_json(out / "metrics.json", metrics)
    print(format_run(metrics), f"\nmetrics and predictions: {out}", sep="\n")
    return metrics


def run_metrics(records: Sequence[Record], emotions: Sequence[str]) -> dict[str, Any]:
    """Every metric that needs nothing but the records of a predictions file that E-CORE wrote.

    Percentages are Dist-n and the accuracies; ``recall_at`` holds mean numbers of emotions, as the paper's
    Table 3. For a model that perceives no emotions the metrics of emotions are left out.
    """
    ppl, ppl_per_sample = perplexity([r["nll"] for r in records], [r["tokens"] for r in records])
    metrics = {
        "samples": len(records),
        "ppl": ppl,
        "ppl_per_sample": ppl_per_sample,
        **text_metrics(records),
    }
    if not has_emotions(records[0]):
        return metrics
    true = [r["emotion"] for r in records]
    predicted = [r["predicted_emotion"] for r in records]
    ranked = [[name for name, _ in r["emotions"]] for r in records]
    single = [{emotion} for emotion in true]
    metrics["recall_at"] = {str(k): recall_at(ranked, single, k) for k in RECALL_AT}
    if all("relevant" in r for r in records):
        relevant = [r["relevant"] for r in records]
        metrics["recall_relevant"] = recall_at(relevant, single)
        metrics["relevant_size"] = sum(map(len, relevant)) / len(relevant)
    metrics["accuracy_by_context_words"] = accuracy_by_length(
        predicted, true, [r["context_words"] for r in records]
    )
    metrics["emotions"] = accuracy_by_emotion(predicted, true, emotions)
    return metrics


def format_run(metrics: dict[str, Any]) -> str:
    """:func:`evaluate_run`'s metrics as a table to read."""
    vocabulary, decoding, human = metrics["vocabulary"], metrics["decoding"], metrics["human"]
    rival = metrics.get("model") in BASELINES
    system = metrics["model"] if rival else f"{metrics['strategy']} strategy"
    unit, table = ("subwords", " (Table 6)") if vocabulary["kind"] == "subword" else ("words", "")
    lines = [
        f"{metrics['split']}: {metrics['samples']:,} samples, {metrics['checkpoint']}, "
        f"{system}, {_decoding(decoding)}{_weights(metrics)}, at most {decoding['max_length']} {unit}",
        f"perplexities are under the {vocabulary['kind']!r} vocabulary of {vocabulary['words']:,} {unit} "
        "and compare only under the same one",
        "",
        _row("ppl", metrics["ppl"], "per token"),
        _row("ppl_per_sample", metrics["ppl_per_sample"], f"<- comparable with the papers' numbers{table}"),
        _row("Dist-1", metrics["dist_1"], f"human {human['dist_1']:.2f}"),
        _row("Dist-2", metrics["dist_2"], f"human {human['dist_2']:.2f}"),
        *_text_rows(metrics, "human"),
    ]
    if "accuracy" in metrics:
        lines.append(_row("Acc", metrics["accuracy"], "%"))
        lines += [_row(f"R@{k}", value, "true emotions") for k, value in metrics["recall_at"].items()]
    if "recall_relevant" in metrics:
        size = f"true emotions in the relevant set, of {metrics['relevant_size']:.2f} on average"
        lines.append(_row("R@relevant", metrics["recall_relevant"], size))
    lines.append(_row("response words", metrics["mean_length"], f"human {human['mean_length']:.2f}"))
    if "multi_emotion" in metrics:
        lines += ["", format_multi_emotion(metrics["multi_emotion"])]
    if "accuracy" in metrics:
        lines += ["", "accuracy by words of context"]
        lines += [
            _row("  " + group["words"], group["accuracy"], f"% of {group['samples']:,}")
            for group in metrics["accuracy_by_context_words"]
        ]
    if "yardsticks" in metrics:
        lines += ["", *_yardstick_rows(metrics)]
    if "emotions" in metrics:
        lines += ["", *_extremes(metrics["emotions"])]
    return "\n".join(lines)


def _weights(metrics: dict[str, Any]) -> str:
    weights = metrics.get("weights", "float32")
    return "" if weights == "float32" else f", weights {weights}"


def _decoding(settings: dict[str, Any]) -> str:
    """Format the decoding: its method, and those of its settings that are not the default."""
    usual = asdict(Decoding())
    own = ("beams", "length_penalty") if settings["method"] == "beam" else ()
    changed = [
        f"{name} {value}"
        for name, value in settings.items()
        if name not in ("method", "max_length") and (name in own or value != usual[name])
    ]
    return ", ".join([settings["method"], *changed])


def format_file(metrics: dict[str, Any]) -> str:
    """:func:`~ecore.evaluation.predictions.evaluate_file`'s metrics as a table to read."""
    human = metrics["human"]
    lines = [
        f"{metrics['samples']:,} samples",
        _row("Dist-1", metrics["dist_1"], f"references {human['dist_1']:.2f}"),
        _row("Dist-2", metrics["dist_2"], f"references {human['dist_2']:.2f}"),
        *_text_rows(metrics, "references"),
        _row("response words", metrics["mean_length"], f"references {human['mean_length']:.2f}"),
    ]
    if "accuracy" in metrics:
        lines.append(_row("Acc", metrics["accuracy"], "%"))
    if "multi_emotion" in metrics:
        lines += ["", format_multi_emotion(metrics["multi_emotion"])]
    return "\n".join(lines)


def _text_rows(metrics: dict[str, Any], others: str) -> list[str]:
    """Repetition and BLEU-4, which older files lack; ``others`` names the references."""
    if "rep_3" not in metrics:
        return []
    signature = metrics["bleu_signature"] or f"needs the package sacrebleu: pip install {INSTALL}"
    return [
        _row("Rep-3", metrics["rep_3"], f"{others} {metrics['human']['rep_3']:.2f}"),
        _row("BLEU-4", metrics["bleu_4"], signature),
    ]


def _row(name: str, value: float | None, note: str) -> str:
    return f"{name:<27}{'-' if value is None else format(value, '.2f'):>9}  {note}"


def _yardstick_rows(metrics: dict[str, Any]) -> list[str]:
    lines = ["yardsticks: a model that does not pass these has not learned"]
    for name, value in metrics["yardsticks"].items():
        if name == "naive_bayes_accuracy":
            if "accuracy" not in metrics:
                continue
            label, passed = "naive Bayes, Acc", metrics["accuracy"] > value
        else:
            label = name.replace("kneser_ney_", "Kneser-Ney ") + ", ppl"
            passed = metrics["ppl"] < value
        lines.append(_row("  " + label, value, "passed" if passed else "not passed"))
    return lines


def _extremes(emotions: dict[str, dict[str, Any]]) -> list[str]:
    """The emotions recognised best and worst; all of them where they are few."""
    known = [(name, e["accuracy"]) for name, e in emotions.items() if e["accuracy"] is not None]
    ranked = sorted(known, key=lambda item: -item[1])
    few = min(EXTREMES, max(0, len(ranked) - EXTREMES))
    groups = {"best": ranked[:EXTREMES], "worst": ranked[::-1][:few]}
    return [
        f"{title + ' emotions':<16} " + ", ".join(f"{name} {value:.2f}" for name, value in group)
        for title, group in groups.items()
        if group
    ]
