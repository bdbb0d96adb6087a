"""Passes over the logits of a cross entropy on a CPU: csrc/softmax_rows_cpu.cpp, seen from torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ecore_kernels.label_smoothing import Goal
from ecore_kernels.native_kernels import address, kernel
from ecore_kernels.reference_kernels import linear_cross_entropy
from ecore_kernels.reference_kernels.linear_cross_entropy import Sums


class InCpp:
    """The passes in C++, on float32 and float64; 16-bit logits are converted first."""

    def adds(self, kind: torch.dtype, exact: torch.dtype) -> bool:
        return kind is exact

    def sums(
        self, logits: Tensor, offset: Tensor | None, goal: Goal, exact: torch.dtype
    ) -> tuple[Tensor, Sums]:
        work = logits.to(exact).contiguous()
        offset = None if offset is None else offset.contiguous()
        maximum, inverse = (work.new_empty(len(work), 1) for _ in range(2))
        mean = work.new_empty(len(work), 1) if goal.base else None
        kernel("softmax_row_sums", exact)(
            work.data_ptr(), address(offset), (*work.shape, goal.hole), maximum.data_ptr(), inverse.data_ptr(),
            address(mean), torch.get_num_threads(),
        )  # fmt: skip
        return work, Sums(maximum, inverse, mean)

    def errors(self, work: Tensor, sums: Sums, factor: Tensor, target: Tensor, goal: Goal) -> Tensor:
        factor, target = factor.contiguous(), target.contiguous()
        kernel("softmax_row_errors", work.dtype)(
            work.data_ptr(), (*work.shape, goal.hole), sums.maximum.data_ptr(), sums.inverse.data_ptr(),
            factor.data_ptr(), target.data_ptr(), goal.base, goal.extra, torch.get_num_threads(),
        )  # fmt: skip
        return work


def forward(*arguments: Any) -> None:
    """Compute the losses, and the gradients that are needed: see ``linear_cross_entropy.run``."""
    linear_cross_entropy.run(InCpp(), *arguments)
