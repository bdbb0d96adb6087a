"""A check of one call of an operator against its formula in plain PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels.verify.oracle import Bounds
from ecore_kernels.verify.rows import Row

TYPES = {"bfloat16": torch.bfloat16, "float64": torch.float64}
"""Types of tensors by precision; float32 for the others."""


@dataclasses.dataclass(frozen=True)
class CallCheck(ABC):
    """One call of an operator, to be made on every backend."""

    operator: str
    variant: str
    precision: str
    device: str

    @property
    @abstractmethod
    def size(self) -> int:
        """The size that a row of the result names."""

    @functools.cached_property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The leaves by name, and as ``upstream0``, ``upstream1``, ... the gradients of the first outputs."""

    @abstractmethod
    def refusals(self, backend: str) -> list[str]:
        """Return the reasons why a backend cannot run the call."""

    @abstractmethod
    def outputs(self, leaves: dict[str, Tensor], backend: str | None) -> Sequence[Tensor]:
        """Outputs of the operator on a backend; with None, of its formula in the tensors' type."""

    def row(self, backend: str) -> Row:
        """An empty row."""
        return Row(self.operator, self.variant, 0, backend, "", self.precision, self.size)

    def run(self, backend: str) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        return self._answer(self.tensors, backend)

    def judge(self, row: Row, found: dict[str, Tensor]) -> None:
        """Enter the verdict on an answer into the row, and its error."""
        self._bounds.judge(row, found)

    @functools.cached_property
    def _bounds(self) -> Bounds:
        wide = {name: x.double() for name, x in self.tensors.items()}
        bounds = Bounds(self._answer(wide, None), self._answer(self.tensors, None), self.precision)
        if "edge_scale" in wide:
            bounds.hold_to_gate("edge_scale", "gate", wide)
        return bounds

    def _answer(self, tensors: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
        names = [name for name in tensors if not name.startswith("upstream")]
        leaves = {name: tensors[name].detach().requires_grad_() for name in names}
        outputs = self.outputs(leaves, backend)
        sent = [tensors[name] for name in tensors if name.startswith("upstream")]
        sent = [x.to(output.dtype) for x, output in zip(sent, outputs, strict=False)]
        gradients = torch.autograd.grad(outputs[: len(sent)], list(leaves.values()), sent)
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        return found | {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)}
