"""The 2x rule where softmaxes saturate: |x| from 1 to 10^5, medians over nine draws, outputs and every gradient."""

from __future__ import annotations

import pytest

from ecore_kernels import native

from .saturated import CASES, LARGEST, SEQUENCES, ratios


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("case", [*CASES, *SEQUENCES])
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            "native",
            marks=pytest.mark.skipif(not native.available(), reason="the compiled extension is missing"),
        )
    ],
)
def test_errors_are_within_twice_plain_pytorchs(backend, case, largest):
    found = ratios(case, largest, backend)
    assert {name: ratio for name, ratio in found.items() if not ratio <= 2} == {}
