"""Checks of the operators that are parts of a training step: linear_cross_entropy and dropout_add_layer_norm."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ecore_kernels import backends, reference
from ecore_kernels.operators.dropout_add_layer_norm import dropout_add_layer_norm
from ecore_kernels.operators.linear_cross_entropy import linear_cross_entropy
from ecore_kernels.verify.call_check import TYPES, CallCheck

# Operator and variant: label smoothing over all classes or those of the published form; dropped or not.
STEP_CALLS = (
    ("linear_cross_entropy", ""),
    ("linear_cross_entropy", "smoothed"),
    ("linear_cross_entropy", "V - 2"),
    ("dropout_add_layer_norm", ""),
    ("dropout_add_layer_norm", "p = 0"),
)
ROWS, CLASSES, WIDTH = 77, 331, 100
SMOOTHING, PADDING = 0.1, 0
DROPOUT, EPS, SEED = 0.2, 1e-5, 0x5EED


@dataclasses.dataclass(frozen=True)
class StepCheck(CallCheck):
    """One call of an operator on rows."""

    @property
    def size(self) -> int:
        """The number of rows."""
        return ROWS

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The leaves by name, and their outputs' gradients; of a loss 1."""
        generator = torch.Generator().manual_seed(0)
        kind = TYPES.get(self.precision, torch.float32)
        if self.operator == "linear_cross_entropy":
            shapes = {"hidden": (ROWS, WIDTH), "weight": (CLASSES, WIDTH), "bias": (CLASSES,)}
        else:
            shapes = {"x": (ROWS, WIDTH), "residual": (ROWS, WIDTH), "weight": (WIDTH,), "bias": (WIDTH,)}
            shapes |= {"upstream0": (ROWS, WIDTH), "upstream1": (ROWS, WIDTH)}
        drawn = {
            name: torch.randn(shape, generator=generator).to(self.device, kind)
            for name, shape in shapes.items()
        }
        if self.operator == "linear_cross_entropy":
            drawn["upstream0"] = torch.ones((), dtype=kind, device=self.device)
        return drawn

    @functools.cached_property
    def target(self) -> Tensor:
        """[rows] int64, some of them padding."""
        drawn = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
        drawn[::5] = PADDING
        return drawn.to(self.device)

    @property
    def _smoothing(self) -> tuple[float, int | None]:
        return SMOOTHING if self.variant else 0.0, CLASSES - 2 if self.variant == "V - 2" else None

    @property
    def _dropout(self) -> float:
        return 0.0 if self.variant else DROPOUT

    def refusals(self, backend: str) -> list[str]:
        """Return the reasons why a backend cannot run the call."""
        leaves = [x for name, x in self.tensors.items() if not name.startswith("upstream")]
        return backends.BACKENDS[backend].why_not(self.operator, *leaves)

    def outputs(self, leaves: dict[str, Tensor], backend: str | None) -> tuple[Tensor, Tensor]:
        """Outputs of the operator on a backend; with None, of its formula in the tensors' type."""
        if self.operator == "linear_cross_entropy":
            return self._plain_loss(**leaves) if backend is None else self._loss(backend, **leaves)
        return self._plain_norm(**leaves) if backend is None else self._norm(backend, **leaves)

    def _loss(self, backend: str, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        smoothing, classes = self._smoothing
        return linear_cross_entropy(
            hidden,
            weight,
            bias,
            self.target,
            label_smoothing=smoothing,
            smoothing_classes=classes,
            ignore_index=PADDING,
            backend=backend,
        )

    def _plain_loss(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        same = torch.eye(CLASSES, dtype=logits.dtype, device=logits.device)
        smoothing, classes = self._smoothing
        return reference.linear_cross_entropy(
            logits, same, None, self.target, smoothing, classes, PADDING, True
        )

    def _norm(
        self, backend: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        p = self._dropout
        return dropout_add_layer_norm(x, residual, weight, bias, p, eps=EPS, seed=SEED, backend=backend)

    def _plain_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        seed = torch.tensor(SEED, device=x.device) if self._dropout else None
        total = residual + reference.dropped(x, seed, self._dropout)
        return F.layer_norm(total, (WIDTH,), weight, bias, EPS), total
