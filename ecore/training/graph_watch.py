"""A warning when the emotion graph gives every context the same signal."""

from __future__ import annotations

from collections.abc import Mapping

from ecore.training.checkpoint import Progress

SHARE = "health_perception_context"
"""Key of the log: share of the variance of h^g, after LayerNorm, that lies between contexts."""
LEAST_SHARE = 0.05
"""Under it the graph is blind."""
PATIENCE = 200
"""Steps that it may be blind for without a warning."""
LEAST_CONTEXTS = 8
"""Contexts of a batch whose share says something."""


class GraphWatch:
    """The look at each logged line of a run, from the end of the warm-up on.

    Args:
        warmup: steps of rising learning rate; what the graph says before their end counts for nothing.
        progress: of the run; it keeps since when the graph is blind.
    """

    def __init__(self, warmup: int, progress: Progress) -> None:
        self._warmup, self._progress = warmup, progress
        self._warned = False

    def look(self, line: Mapping[str, float], contexts: int) -> str | None:
        """Return a warning, once for each time that the graph goes blind; None where there is nothing to say.

        Args:
            line: of the log; without :data:`SHARE` where the model has no h^g.
            contexts: of the batch that the share is of.
        """
        step = int(line["step"])
        if SHARE not in line or contexts < LEAST_CONTEXTS or step <= self._warmup:
            return None
        if not line[SHARE] < LEAST_SHARE:
            self._progress.blind_since, self._warned = None, False
            return None
        if self._progress.blind_since is None:
            self._progress.blind_since = step
        steps = step - self._progress.blind_since
        if steps < PATIENCE or self._warned:
            return None
        self._warned = True
        return (
            f"warning: step {step}: the emotion graph is blind. For {steps} steps less than "
            f"{100 * LEAST_SHARE:.0f} % of h^g's variance lay between contexts ({line[SHARE]:.4f} now, {SHARE}): it "
            "says the same of every dialogue. Another --seed, a longer --warmup or a smaller --factor may help; "
            "see 'What the log tells of the graph' in docs/model.md"
        )
