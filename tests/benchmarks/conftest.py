"""A small model on made-up batches."""

from __future__ import annotations

import pytest

from tests.benchmarks.small import small_workload


@pytest.fixture(scope="module")
def small():
    """Made-up batches of a small model and vocabulary."""
    with small_workload("released", batch_size=8, number=6) as workload:
        yield workload
