"""Check an installation: every operator on every backend that runs here, against float64.

``python -m ecore_kernels.verify`` draws random inputs, runs each operator forward and backward on each backend, and
compares outputs and gradients with the paper's layer-by-layer recurrence in float64. The error may be twice that of the
same recurrence in plain PyTorch, in the type and precision of the call, plus rounding; NaN never passes. Each call runs
twice, and a fused kernel must give the same bits. The exit code is 0 if all is right and 1 if anything is wrong. A
backend that refuses a call is listed with its reason.
"""

from __future__ import annotations

from ecore_kernels.verify.checks import CALLS, SIZES, OperatorCheck, make_row
from ecore_kernels.verify.command import main, run
from ecore_kernels.verify.compilers import Compilers
from ecore_kernels.verify.edge_checks import EDGE_CALLS, EdgeCheck
from ecore_kernels.verify.sequence_checks import SEQUENCE_CALLS, SequenceCheck

__all__ = [
    "CALLS",
    "EDGE_CALLS",
    "SEQUENCE_CALLS",
    "SIZES",
    "Compilers",
    "EdgeCheck",
    "OperatorCheck",
    "SequenceCheck",
    "main",
    "make_row",
    "run",
]
