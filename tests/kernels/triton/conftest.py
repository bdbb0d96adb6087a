"""The device on which a test runs Triton's kernels: the CPU, interpreted, or a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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


@pytest.fixture
def uninitialised_is_nan(monkeypatch):
    """Make what is allocated start as NaN, or as a number that no index may have."""
    for owner, name in (
        (torch, "empty"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
    ):
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

        monkeypatch.setattr(owner, name, filled)
