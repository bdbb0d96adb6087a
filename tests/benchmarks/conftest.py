"""A small model on made-up batches."""

from __future__ import annotations

import pytest

from benchmarks import workload
from ecore.config import PRESETS


@pytest.fixture(scope="module")
def small():
    """Made-up batches of a small model and vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "WORDS", 300)
        patch.setattr(workload, "CONTEXT_WORDS", 12)
        patch.setattr(workload, "RESPONSE_WORDS", 6)
        patch.setitem(PRESETS, "released", PRESETS["tiny"])
        yield workload.workload(None, "released", batch_size=8, number=6)
