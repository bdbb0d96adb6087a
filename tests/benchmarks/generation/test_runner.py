"""Measurements: their contexts, and parts that make up the whole."""

from __future__ import annotations

from benchmarks.generation import runner
from benchmarks.generation.runner import Contexts
from ecore.model import ECore


def test_parts_make_up_the_whole(model: ECore) -> None:
    for table in runner.parts(model, Contexts(None, 23_000, "cpu")(2), 2).values():
        assert min(table.values()) > 0.0
        assert {"encode", "self-attention", "cross-attention", "feed-forward", "output projection"} < set(
            table
        )


def test_contexts_have_the_length_asked_for() -> None:
    batch = Contexts(None, 23_000, "cpu")(2, 40)
    assert batch.lengths.tolist() == [41, 41]
    assert int(batch.context.max()) < 23_000
