"""The device on which a test runs Triton's kernels: the CPU, interpreted, or a GPU."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels import triton_kernels

INTERPRETER = pytest.param(
    "cpu",
    id="interpreter",
    marks=pytest.mark.skipif(
        not triton_kernels.INTERPRETED or bool(triton_kernels.unavailable_reason()),
        reason="Triton's interpreter is not in use: TRITON_INTERPRET is not 1, or Triton is missing",
    ),
)


@pytest.fixture(params=[INTERPRETER, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device of a test's tensors."""
    return torch.device(request.param)
