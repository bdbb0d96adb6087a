"""``ecore reproduce``: from prepared data to the paper's tables and figures, in one folder.

The folder holds ``settings.json``, the settings that its runs share; ``runs/NAME``, a folder for each run;
``logs/NAME.log``, the output of its process; ``prepared-SOURCE``, the data with other word intensities; and the tables
and figures.
"""

from __future__ import annotations

import fcntl
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ecore.data.prepared import PreparedData
from ecore.data.rescore import with_intensity
from ecore.errors import InputError
from ecore.evaluation.multi_emotion import (
    Labels,
    labelled_records,
    multi_emotion_recall,
    read_multi_emotion,
    split_emotions,
)
from ecore.evaluation.predictions import read_predictions, text_metrics
from ecore.files import atomic_path, expect_folder, read_json, write_json
from ecore.metrics import perplexity
from ecore.model.backbone import expect as expect_backbone
from ecore.model.weights import count_weights
from ecore.packages import needed
from ecore.paper.experiments import tables
from ecore.paper.experiments.drawings import draw, drawn_from
from ecore.paper.experiments.plan import (
    FINE_TUNING,
    Brought,
    Run,
    Settings,
    Variant,
    plan_runs,
    rows_of,
    seeds_of,
)
from ecore.paper.experiments.runs import SCORES, Outcome, commands, execute, is_done
from ecore.paper.published import EXPERIMENTS, FIGURES, P_SOFT_OVER_CEM, RECALL, STEPS, TABLES
from ecore.pretrained import weights_file
from ecore.training.cuda_graphs import recorder
from ecore.training.journal import read_metrics


def reproduce(
    what: Sequence[str],
    data: Path,
    out: Path,
    settings: Settings,
    *,
    seeds: int | None = None,
    intensity_files: Mapping[str, Path] | None = None,
    multi_emotion: Path | None = None,
    backbone: str | None = None,
    baselines: bool = False,
    inferences: str | None = None,
    sample: int = 0,
    jobs: int = 1,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool = True,
    plan_only: bool = False,
) -> Outcome:
    """Do the runs that ``what`` needs, those in ``out`` already left out, and write tables and figures to ``out``.

    Args:
        what: names of :data:`ecore.paper.published.EXPERIMENTS`, or ``all``.
        data: a prepared folder.
        settings: what all runs share; ``out`` keeps to those that it was begun with.
        seeds: runs of each variant; default one, and five for Table 7.
        intensity_files: word scores by source, for Table 9.
        multi_emotion: label file of the subset of Table 3.
        backbone: name or folder of the pre-trained model of Table 6.
        baselines: train Table 1's other systems, too (:mod:`ecore.baselines`).
        inferences: file that CEM among them reads.
        sample: the dialogue of Figures 5 and 6: number, from 0, in the test split.
        jobs, device, threads: see :func:`ecore.paper.experiments.runs.execute`.
        plan_only: print the commands of the runs that are not done, and train nothing.

    Returns:
        Which runs failed, and whether it was interrupted; tables are written either way.

    Raises:
        InputError: something that the user gave cannot be used, or another process works in ``out``.
    """
    names = [name for name in EXPERIMENTS if name in what or "all" in what]
    if not plan_only:
        _check_packages(names)
    expect_folder(out)
    prepared = PreparedData.load(data)
    brought = replace(
        _brought(prepared, settings, intensity_files or {}, multi_emotion, backbone),
        baselines=baselines,
        inferences=inferences,
    )
    labels = _labels(prepared, multi_emotion)
    if not 0 <= sample < len(prepared.test):
        raise InputError(f"--sample: expected 0 to {len(prepared.test) - 1:,}, got {sample}")
    rows = {name: rows_of(name, brought) for name in names if name in TABLES}
    counts = _counts(names, rows, seeds)
    _check_width(prepared, settings, counts)
    _check_files(brought.intensity_files.values())
    if inferences is not None and not Path(inferences).is_file():
        raise InputError(f"--inferences: {inferences}: no such file")
    if not out.exists():
        recorder(settings.training, None, torch.device(device), 1, resumed=False)  # may refuse --cuda-graphs
    settings.agree(out, prepared)
    with _alone(out):
        runs = plan_runs(counts, out, settings, _by_source(prepared, brought, counts, out))
        _check_backbone(backbone, runs)
        _announce(runs, settings)
        if plan_only:
            for run in runs:
                if not is_done(run):
                    print("", *commands(run, settings, device, threads), sep="\n")
            return Outcome()
        outcome = execute(
            runs,
            out / "logs",
            preset=settings.preset,
            limit=settings.limit,
            jobs=jobs,
            device=device,
            threads=threads,
            progress=progress,
        )
        for table, of_table in rows.items():
            with _noted(table, outcome):
                _write_table(table, of_table, runs, outcome, out, prepared, settings, labels)
        if not outcome.interrupted:
            for name in names:
                if name not in TABLES:
                    with _noted(name, outcome):
                        _draw(name, runs, prepared, out, sample)
    return outcome


def _brought(
    data: PreparedData,
    settings: Settings,
    intensity_files: Mapping[str, Path],
    multi_emotion: Path | None,
    backbone: str | None,
) -> Brought:
    source = data.meta["intensity"]
    if source in intensity_files:
        raise InputError(
            f"--intensity-file {source}: {data.folder} is prepared with {source} already; leave it out"
        )
    relations = data.meta.get("relations") is not None and settings.model.commonsense
    return Brought(source, relations, dict(intensity_files), multi_emotion, backbone)


def _labels(data: PreparedData, multi_emotion: Path | None) -> Labels | None:
    if multi_emotion is None:
        return None
    return read_multi_emotion(multi_emotion, data.vocabulary.emotions, split_emotions(data.test))


def _counts(
    names: Sequence[str], rows: Mapping[str, Mapping[str, Variant | str]], seeds: int | None
) -> dict[Variant, int]:
    """Return how many seeds of each variant are needed, those that figures and cases show among them."""
    counts = seeds_of(list(rows), rows, seeds)
    for name in names:
        for variant in drawn_from(name):
            counts.setdefault(variant, 1)
    return counts


def _check_width(data: PreparedData, settings: Settings, variants: Iterable[Variant]) -> None:
    width = 0 if data.embeddings is None else data.embeddings.shape[1]
    if width > settings.model.dim and any(variant.backbone is None for variant in variants):
        raise InputError(
            f"--dim: expected at least {width}, the width of {data.folder}'s word vectors, got {settings.model.dim}"
        )


def _check_files(files: Iterable[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise InputError(f"--intensity-file: {file}: no such file")


def _check_backbone(backbone: str | None, runs: Sequence[Run]) -> None:
    """Check the backbone before the work, where a run is still to begin on it."""
    if backbone is None:
        return
    if any(run.model.backbone == backbone and not run.folder.exists() for run in runs):
        expect_backbone(backbone)


def _by_source(
    data: PreparedData, brought: Brought, variants: Iterable[Variant], out: Path
) -> dict[str | None, PreparedData]:
    """Return the data with the intensities of each source that a variant names; under None as it is."""
    by_source: dict[str | None, PreparedData] = {None: data}
    for source in {v.intensity for v in variants if v.intensity is not None}:
        file = brought.intensity_files.get(source)
        by_source[source] = with_intensity(data, out / f"prepared-{source}", source, file)
    return by_source


@contextmanager
def _noted(name: str, outcome: Outcome) -> Iterator[None]:
    """Note as a failure of ``name`` what cannot be made, so that the others are."""
    try:
        yield
    except InputError as error:
        outcome.failures[name] = str(error)


def _check_packages(names: Sequence[str]) -> None:
    for package, results in (("scipy", TABLES), ("matplotlib", FIGURES)):
        asked = [name for name in names if name in results]
        if asked:
            needed(package, f"reproduce {asked[0]}", "'ecore[experiments]'")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes out of ``out``, until the last run's process has ended, too."""
    with (out / ".lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{out}: another `ecore reproduce` is at work there; wait for it, or stop it"
            ) from None
        yield


def _announce(runs: Sequence[Run], settings: Settings) -> None:
    if not runs:
        print("nothing to train", flush=True)
        return
    done = sum(map(is_done, runs))
    begun = sum(run.folder.exists() for run in runs) - done
    print(
        f"{tables.counted(len(runs), 'run')} of {settings.training.max_steps:,} steps: {done} done, {begun} begun, "
        f"{len(runs) - done - begun} to begin",
        flush=True,
    )
    if settings.training.warmup > settings.training.max_steps:
        print(
            f"note: the learning rate rises for {settings.training.warmup:,} steps, more than there are; "
            "for a few thousand steps --warmup 1000 is a better choice",
            flush=True,
        )


# Tables


def _write_table(
    name: str,
    rows: Mapping[str, Variant | str],
    runs: Sequence[Run],
    outcome: Outcome,
    out: Path,
    data: PreparedData,
    settings: Settings,
    labels: Labels | None,
) -> None:
    measure: Callable[[Run], tables.Measured | None] = _measure
    if name == "table3" and labels is not None:
        known = labels

        def measure(run: Run) -> tables.Measured | None:
            return _measure_subset(run, known, settings.limit)

    rivals = any(isinstance(variant, Variant) and variant.model != "ecore" for variant in rows.values())
    if rivals:
        measure = _measure_with_cost
    table = tables.build(
        name, rows, runs, measure, outcome.failures, further_columns=tables.COST if rivals else ()
    )
    notes = _notes(name, [run for run in runs if run.variant in rows.values()], data, settings)
    table |= {"notes": notes, "data": data.meta["fingerprint"], "limit": settings.limit}
    text = tables.markdown(table, notes)
    write_json(out / f"{name}.json", table)
    with atomic_path(out / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    if not outcome.interrupted:
        print(f"\n{text}", flush=True)
    print(f"{out / name}.md, {name}.json", flush=True)


def _measure(run: Run) -> tables.Measured | None:
    return tables.measured(read_json(run.folder / SCORES / "metrics.json")) if is_done(run) else None


def _measure_with_cost(run: Run) -> tables.Measured | None:
    """Return the same and :data:`ecore.paper.experiments.tables.COST`."""
    values = _measure(run)
    if values is None:
        return None
    weights = count_weights(weights_file(run.folder, "last"))
    seconds = [line["seconds_per_step"] for line in read_metrics(run.folder)]
    return values | dict(zip(tables.COST, (weights / 1e6, 1.0 / statistics.median(seconds)), strict=True))


def _measure_subset(run: Run, labels: Labels, limit: int | None) -> tables.Measured | None:
    """Table 3: the same metrics on the labelled conversations alone, and how many of their emotions are recognised."""
    if not is_done(run):
        return None
    records = read_predictions(run.folder / SCORES / "predictions.jsonl")
    if limit is not None:
        scored = {record["conv_id"] for record in records}
        labels = {conv_id: names for conv_id, names in labels.items() if conv_id in scored}
        if not labels:
            return {}
    chosen = [dict(record) for record in labelled_records(records, labels)]
    recall = multi_emotion_recall(records, labels)
    counted = text_metrics(chosen)
    _, counted["ppl_per_sample"] = perplexity([r["nll"] for r in chosen], [r["tokens"] for r in chosen])
    values = tables.measured(counted)
    values |= {f"R@{k}": value for k, value in recall["recall_at"].items()}
    return values | {RECALL[-1]: recall.get("recall_relevant")}


def _notes(name: str, runs: Sequence[Run], data: PreparedData, settings: Settings) -> list[str]:
    """Return the notes that a table's reader needs."""
    meta, training = data.meta, settings.training
    scored = len(data.test) if settings.limit is None else min(settings.limit, len(data.test))
    part = "all" if scored == len(data.test) else "only the first"
    glove = ", ".join(meta["glove"]) or "none"
    related = bool(meta.get("relations")) and settings.model.commonsense and name != "table6"
    unit = f"under the '{meta['vocabulary']}' vocabulary of {meta['vocabulary_size']:,} words"
    if name == "table6":
        unit = "counted in the backbone's subwords"
    notes = [
        f"PPL is per sample (`ppl_per_sample`: what the published systems print), {unit}; perplexities compare "
        "only under one vocabulary.",
        f"Ours: mean ± sample standard deviation over seeds; {part} {scored:,} samples of the test split, greedy "
        f"decoding. Preset {settings.preset}, {training.max_steps:,} steps of {training.batch_size} × "
        f"{training.accumulate} samples, warm-up {training.warmup:,}; word vectors: {glove}; word intensities: "
        f"{meta['intensity']} (the paper: SKEP); related words: "
        f"{'yes' if related else 'no'}.",
    ]
    if training.max_steps < STEPS:
        notes.append(
            f"{training.max_steps:,} steps of the paper's {STEPS:,}: the differences to the paper say little yet "
            "about the method."
        )
    if scored < len(data.test):
        notes.append("Dist-n falls as more responses are counted, so on a part of the split it is too high.")
    special = {
        "table1": "Human evaluation is quoted only; `ecore human` makes the sheets for one of your own. Our "
        "Transformer has related words where ours have them." + _rivals_note(runs),
        "table3": "Ours is on the labels that --multi-emotion gives, at each conversation's last listener turn; "
        "the paper's 739 labelled samples are not public, so compare rows, not papers.",
        "table6": _backbone_note(runs),
        "table7": f"Appendix G tells p = {P_SOFT_OVER_CEM:.2e} for Ours(Soft) over CEM.",
        "table8": "Rows without commonsense are not in the paper.",
        "table9": "Rows differ in word intensities alone: related words stay those of the prepared data. "
        "Thresholds are matched to each source's intensities unless --literal-thresholds is given.",
    }
    notes += [special[name]] if name in special else []
    return [
        *notes,
        "Rows marked *quoted* are the paper's figures of other systems, not run here. The t-test is Student's, "
        "one-sided, over seeds: two samples against a row of ours, one sample against a quoted number.",
    ]


def _rivals_note(runs: Sequence[Run]) -> str:
    if all(run.variant.model == "ecore" for run in runs):
        return ""
    return (
        " Other systems are trained on the same data with the same optimiser and decoding (docs/baselines.md): at the "
        "sizes at which their authors publish them, and at our size. Steps/s is the median that a run's log tells."
    )


def _backbone_note(runs: Sequence[Run]) -> str:
    if not runs:
        return "No backbone was given."
    settings = vars(runs[0].training) | vars(runs[0].model)
    values = ", ".join(f"{name} {settings[name]:,}" for name in FINE_TUNING)
    return f"The backbone of ours: {settings['backbone']}; {values}. It has no use for related words."


# Figures and cases


def _draw(name: str, runs: Sequence[Run], data: PreparedData, out: Path, sample: int) -> None:
    """
    Raises:
        InputError: it cannot be drawn.
    """
    chosen = [next(run for run in runs if run.variant == v and run.seed == 0) for v in drawn_from(name)]
    missing = [run.name for run in chosen if not is_done(run)]
    if missing:
        raise InputError(f"it needs {', '.join(missing)}")
    draw(name, {run.variant: run.folder for run in chosen}, data, out, sample)
