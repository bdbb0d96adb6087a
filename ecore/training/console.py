"""Console output of a training: the opening words, the progress bar, and notices printed above it."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ecore.config import TrainingConfig
from ecore.data.prepared import PreparedData
from ecore.progress import BARS, tqdm
from ecore.training.run_folder import Settings

T = TypeVar("T")


class Console:
    """One process's bar and lines.

    Args:
        shows_progress: without it there is no bar, and only notices are written.
        step, max_steps: where the bar begins and ends.
    """

    def __init__(self, shows_progress: bool, step: int, max_steps: int) -> None:
        self.shows_progress = shows_progress
        self._bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True, **self._bar_style())

    def _bar_style(self) -> dict[str, Any]:
        # A file or a pipe keeps every refresh of the bar.
        return {"disable": not self.shows_progress, "mininterval": 0.2 if sys.stderr.isatty() else 15.0}

    def open(self, opening: str, no_events: str | None) -> None:
        """Write the opening words, and what the user could install: a bar, or events for TensorBoard."""
        self.print(opening)
        if not BARS:
            self.print("no progress bar: tqdm is not installed (pip install tqdm)")
        if no_events:
            self.print(f"no events for TensorBoard: {no_events} (pip install tensorboard)")

    def print(self, text: str) -> None:
        """Write a line for those who want to see progress."""
        if self.shows_progress:
            self.notice(text)

    def notice(self, text: str) -> None:
        """Write a line for everybody, with or without progress."""
        self._bar.write(text, file=sys.stderr)

    def advance(self) -> None:
        """Move the bar by a step."""
        self._bar.update()

    def show_losses(self, line: Mapping[str, Any]) -> None:
        """Show a log line's losses behind the bar."""
        self._bar.set_postfix({k: f"{line[k]:.2f}" for k in ("loss", "emotion")}, refresh=False)

    def validating(self, batches: Iterable[T]) -> Any:
        """Return a second bar over the batches of a validation."""
        return tqdm(batches, "validating", leave=False, unit="batch", **self._bar_style())

    def show_validation(self, step: int, results: Mapping[str, float], best: bool) -> None:
        """Write a validation's perplexities and accuracy."""
        per_token, per_sample = results["valid_ppl"], results["valid_ppl_per_sample"]
        accuracy = [v for name, v in results.items() if name.endswith("accuracy")]
        self.print(
            f"step {step}: validation perplexity {per_token:.2f} per token, {per_sample:.2f} per "
            f"sample{' (best so far)' if best else ''}"
            + "".join(f", emotion accuracy {value:.2f} %" for value in accuracy)
        )

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


def machine(device: torch.device, config: TrainingConfig, processes: int, captured: bool) -> str:
    """Return on what a training runs, and how.

    Args:
        processes: how many train together.
        captured: steps are CUDA graphs.
    """
    several = f"{processes} processes, each " if processes > 1 else ""
    options = (
        ("where tf32 is float32", device.type == "cpu" and config.precision == "tf32"),
        ("CUDA graphs", captured),
        ("compiled", config.compile),
    )
    parts = [f"{several}{device}", f"{torch.get_num_threads()} CPU threads"]
    return ", ".join([*parts, *(name for name, on in options if on)])


def opening(
    run: Path, settings: Settings, data: PreparedData, model: nn.Module, step: int, where: str
) -> str:
    """Return a training's opening words: what is trained, from ``step`` on, on what :func:`machine`."""
    sizes, config = settings.model, settings.training
    parameters = sum(p.numel() for p in model.parameters())
    preset = f" (preset {settings.preset})" if settings.preset else ""
    left_out = f", without {', '.join(sizes.ablations)}" if sizes.ablations else ""
    backbone = f" around {sizes.backbone}" if sizes.backbone else ""
    thresholds = ", ".join(f"{t:.3g}" for t in sizes.thresholds)
    return textwrap.fill(
        f"{run}: {parameters:,} parameters{backbone}{preset}, {sizes.title}{left_out}; "
        f"intensity thresholds {thresholds} on {data.meta['intensity']}; "
        f"{len(data.vocabulary):,} words of the {data.meta['vocabulary']} vocabulary; "
        f"{len(data.train):,} training and {len(data.valid):,} validation samples; "
        f"steps {step:,} to {config.max_steps:,} of {config.batch_size} × {config.accumulate} "
        f"samples; {config.precision} on {where}.",
        width=100,
    )
