"""The training curves of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecore.paper.figures.drawing import COLORS, GREY, INK, NotDrawn, new_figure, styled
from ecore.training.journal import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class TrainingCurves:
    """(step, value) of what was logged, null values left out.

    Attributes:
        loss: the joint loss (Eq. 19), training.
        train_ppl, valid_ppl: perplexity per token; training's under dropout.
        valid_ppl_per_sample: the published papers' perplexity, validation.
        train_accuracy, valid_accuracy: emotion accuracy in percent.
    """

    loss: Points
    train_ppl: Points
    valid_ppl: Points
    valid_ppl_per_sample: Points
    train_accuracy: Points
    valid_accuracy: Points

    def to_json(self) -> dict[str, Any]:
        """Plain lists and names, as JSON has them."""
        return dict(vars(self))


def training_curves(run: Path) -> TrainingCurves:
    """Return the curves in a run's ``metrics.jsonl``.

    Raises:
        NotDrawn: nothing was logged yet.
    """
    lines = read_metrics(run)
    if not lines:
        raise NotDrawn(f"{run / METRICS}: nothing logged yet")

    def points(key: str) -> Points:
        return [(line["step"], line[key]) for line in lines if line.get(key) is not None]

    return TrainingCurves(
        loss=points("loss"),
        # Over 700 nats the exponential overflows; such a model is not one to look at.
        train_ppl=[(step, math.exp(min(nll, 700.0))) for step, nll in points("nll_per_token")],
        valid_ppl=points("valid_ppl"),
        valid_ppl_per_sample=points("valid_ppl_per_sample"),
        train_accuracy=points("emotion_accuracy"),
        valid_accuracy=points("valid_emotion_accuracy"),
    )


@styled
def draw_training(curves: TrainingCurves, title: str = "") -> Figure:
    """Loss, perplexity (on a logarithmic axis) and emotion accuracy over steps, validation as marked points."""
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    figure = new_figure(6.4, 6.6)
    loss, ppl, accuracy = figure.subplots(3, 1, sharex=True)
    figure.subplots_adjust(0.11, 0.07, 0.97, 0.94, hspace=0.18)
    figure.suptitle(title, fontsize=9, x=0.11, ha="left", parse_math=False)

    loss.plot(*_xy(curves.loss), color=INK, linewidth=1.0)
    loss.set_ylabel("training loss (Eq. 19)")

    ppl.plot(*_xy(curves.train_ppl), color=GREY, linewidth=1.0, label="training, per token")
    _points(ppl, curves.valid_ppl, "o", COLORS[0], "validation, per token")
    _points(ppl, curves.valid_ppl_per_sample, "^", COLORS[5], "validation, per sample")
    ppl.set_yscale("log")
    ppl.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ppl.yaxis.set_major_formatter(ScalarFormatter())
    ppl.yaxis.set_minor_locator(NullLocator())
    ppl.set_ylabel("perplexity")

    accuracy.plot(*_xy(curves.train_accuracy), color=GREY, linewidth=1.0, label="training")
    _points(accuracy, curves.valid_accuracy, "s", COLORS[0], "validation")
    accuracy.set_ylim(bottom=0)
    accuracy.set_ylabel("emotion accuracy, %")
    accuracy.set_xlabel("step")
    for axes in (loss, ppl, accuracy):
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.5)
    for axes in (ppl, accuracy):
        axes.legend(fontsize=7, frameon=False)
    return figure


def _xy(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _points(axes: Any, points: Points, marker: str, color: str, label: str) -> None:
    """Draw a validation curve: a line with markers; the legend shows its last value."""
    if points:
        axes.plot(
            *_xy(points),
            marker=marker,
            markersize=5,
            color=color,
            linewidth=1.2,
            label=f"{label}: {points[-1][1]:.1f}",
        )
