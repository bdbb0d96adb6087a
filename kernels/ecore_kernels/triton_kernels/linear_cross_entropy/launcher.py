"""Launches of the passes over the logits of a cross entropy."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ecore_kernels.label_smoothing import Goal
from ecore_kernels.reference_kernels import linear_cross_entropy
from ecore_kernels.reference_kernels.linear_cross_entropy import Sums
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.linear_cross_entropy.kernels import _row_errors, _row_sums

BLOCK = 2048  # classes at a time
OPTIONS = {"num_warps": 8, "num_stages": 3}


class InTriton:
    """The passes in Triton, on logits of any float type."""

    def adds(self, kind: torch.dtype, exact: torch.dtype) -> bool:
        return False  # a GPU's product adds the bias as it writes

    def sums(
        self, logits: Tensor, offset: Tensor | None, goal: Goal, exact: torch.dtype
    ) -> tuple[Tensor, Sums]:
        rows, classes = logits.shape
        maximum, inverse = (logits.new_empty((rows, 1), dtype=exact) for _ in range(2))
        mean = logits.new_empty((rows, 1), dtype=exact) if goal.base else None
        arguments = {
            "logits": logits,
            "maximum": maximum,
            "inverse": inverse,
            "mean": mean,
            "classes": classes,
            "spread": goal.spread,
            "hole": goal.hole,
            "BLOCK": _block(classes),
        }
        launch.launch(_row_sums, (rows,), arguments, OPTIONS, logits.device)
        return logits, Sums(maximum, inverse, mean)

    def errors(self, work: Tensor, sums: Sums, factor: Tensor, target: Tensor, goal: Goal) -> Tensor:
        rows, classes = work.shape
        arguments = {
            "logits": work,
            "maximum": sums.maximum,
            "inverse": sums.inverse,
            "factor": factor.contiguous(),
            "target": target.contiguous(),
            "classes": classes,
            "hole": goal.hole,
            "base_bits": launch.bits(goal.base),
            "extra_bits": launch.bits(goal.extra),
            "BLOCK": _block(classes),
        }
        programs = rows * triton.cdiv(classes, _block(classes))
        launch.launch(_row_errors, (programs,), arguments, OPTIONS, work.device)
        return work


def _block(classes: int) -> int:
    return min(BLOCK, launch.padded(classes))


def forward(*arguments: Any) -> None:
    """Compute the losses, and the gradients that are needed: see ``linear_cross_entropy.run``."""
    linear_cross_entropy.run(InTriton(), *arguments)
