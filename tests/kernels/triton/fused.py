"""An operator's Triton kernels, called by themselves: without a public function, autograd or the dispatcher."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ecore_kernels.operators.registration import compute


@dataclasses.dataclass(frozen=True)
class Fused:
    """Both directions of an operator; arguments are those of the registered operators without ``backend``."""

    operator: str

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return compute(self.operator, "forward", (*arguments, "triton"))

    def backward(self, *arguments: Any) -> list[Tensor]:
        return compute(self.operator, "backward", (*arguments, "triton"))
