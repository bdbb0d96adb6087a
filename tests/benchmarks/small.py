"""Made-up batches of a small model, for any preset's name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from benchmarks import workload
from ecore.config import PRESETS


@contextlib.contextmanager
def small_workload(preset: str, batch_size: int, number: int) -> Iterator[workload.Workload]:
    """Give the workload of ``preset``, whose sizes are those of "tiny" as long as the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "WORDS", 300)
        patch.setattr(workload, "CONTEXT_WORDS", 12)
        patch.setattr(workload, "RESPONSE_WORDS", 6)
        patch.setitem(PRESETS, preset, PRESETS["tiny"])
        yield workload.workload(None, preset, batch_size=batch_size, number=number)
