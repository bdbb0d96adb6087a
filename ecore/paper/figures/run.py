"""Every figure of a run, as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecore import pretrained
from ecore.data.emotion_words import cooccurrence
from ecore.data.prepared import SPLITS, PreparedData
from ecore.errors import InputError
from ecore.files import expect_folder, make_folder, write_json
from ecore.paper.figures.aggregation import draw_aggregation
from ecore.paper.figures.correlation import Correlations, draw_correlations, learned_correlation
from ecore.paper.figures.dialogue import trace
from ecore.paper.figures.drawing import NotDrawn, check_matplotlib, save
from ecore.paper.figures.secondary import draw_secondary, mentions, secondary_shares
from ecore.paper.figures.training import draw_training, training_curves
from ecore.paper.figures.word_edges import draw_word_edges
from ecore.pretrained import data_folder, read_config

FIGURES = ("training", "2", "4", "5", "6")
"""Figures that can be drawn, by the paper's numbers."""


def draw_run(
    run: Path | str,
    out: Path | str,
    *,
    only: Sequence[str] = FIGURES,
    split: str = "test",
    sample: int = 0,
    text: Sequence[str] | None = None,
    data: Path | str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Draw figures of a run into a folder: each as PDF and PNG, and the numbers drawn as JSON.

    Figure 2 and the data's half of Figure 4 count all splits; Figures 5 and 6 are of one dialogue. For each
    that cannot be drawn one line says why.

    Args:
        run: the run's folder.
        out: where the files go; made where it is missing.
        only: which of :data:`FIGURES`.
        split, sample: the dialogue of Figures 5 and 6: sample number ``sample``, from 0, of ``split``.
        text: its turns instead, the speaker's first.
        data: the prepared folder; default the one that the run was trained on, where it is still there.

    Returns:
        The files written.

    Raises:
        InputError: matplotlib is missing; no run; ``data`` that is no folder of the run's vocabulary; a figure, split
            or sample that does not exist; or nothing could be drawn.
    """
    check_matplotlib()
    run, out = Path(run), Path(out)
    if unknown := [name for name in only if name not in FIGURES]:
        raise InputError(f"figure: expected one of {', '.join(FIGURES)}, got {unknown[0]!r}")
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    config = read_config(run)
    expect_folder(out)
    wanted = set(only)
    prepared = _prepared(run, config, data) if wanted != {"training"} else None
    model = pretrained.load(run) if wanted & {"4", "5", "6"} else None
    seen = None
    if model is not None and wanted & {
        "5",
        "6",
    }:  # first, so that a mistake in the dialogue is reported at once
        try:
            seen = trace(model, *_dialogue(prepared, split, sample, text))
        except NotDrawn as reason:
            print(f"figures 5 and 6: not drawn: {reason}")
    make_folder(out)

    written: list[Path] = []

    def put(name: str, figure: Any, numbers: Any) -> None:
        write_json(out / f"{name}.json", numbers.to_json())
        written.extend([*save(figure, out, name), out / f"{name}.json"])
        print(out / f"{name}.pdf")

    if "training" in wanted:
        try:
            curves = training_curves(run)
            put("training", draw_training(curves, Path(os.path.realpath(run)).name), curves)
        except NotDrawn as reason:
            print(f"training: not drawn: {reason}")
    found = None
    if prepared is not None and wanted & {"2", "4"}:
        found = mentions(prepared.conversations(), progress)
    if "2" in wanted:
        if found is None:
            print("figure 2: not drawn: it needs the data (--data PREPARED)")
        else:
            shares = secondary_shares(found)
            put("figure2", draw_secondary(shares), shares)
    if model is not None and "4" in wanted:
        names = model.vocabulary.emotions
        try:
            correlations = Correlations(names, learned_correlation(model))
            if found is None:
                print("figure 4: only the model's half is drawn: the other needs the data (--data PREPARED)")
            else:
                present = [(m.found | {m.emotion}) & set(names) for m in found]
                correlations = Correlations(
                    names, correlations.model, cooccurrence(present, names), len(found)
                )
            put("figure4", draw_correlations(correlations), correlations)
        except NotDrawn as reason:
            print(f"figure 4: not drawn: {reason}")
    if seen is not None and "5" in wanted:
        put("figure5", draw_word_edges(seen), seen)
    if seen is not None and "6" in wanted:
        put("figure6", draw_aggregation(seen), seen)
    if not written:
        raise InputError(f"{run}: nothing could be drawn")
    return written


def _prepared(run: Path, config: dict[str, Any], data: Path | str | None) -> PreparedData | None:
    """Return the prepared folder of ``data``, or the run's own; None, and a line, where it is no longer usable."""
    try:
        folder = Path(data) if data is not None else data_folder(run)
        prepared = PreparedData.load(folder)
        if prepared.vocabulary.fingerprint != config["data"].get("vocabulary_fingerprint"):
            raise InputError(f"{folder}: not the vocabulary that {run} was trained with")
    except InputError as error:
        if data is not None:
            raise
        print(f"the run's data cannot be used: {error}")
        return None
    return prepared


def _dialogue(
    prepared: PreparedData | None, split: str, sample: int, text: Sequence[str] | None
) -> tuple[list[str], str | None]:
    """Turns and, where it is known, the true emotion."""
    if text is not None:
        return list(text), None
    if prepared is None:
        raise NotDrawn("they need the data (--data PREPARED) or a dialogue (--text)")
    samples = getattr(prepared, split)
    if not 0 <= sample < len(samples):
        raise InputError(f"sample: expected 0 to {len(samples) - 1} of the {split} split, got {sample}")
    texts = samples.texts(sample)
    return texts["context"], texts["emotion"]
