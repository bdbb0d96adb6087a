"""Contexts for the real model."""

from __future__ import annotations

from ecore.data.batches import Batch, context_batch
from ecore.model import ECore

CONTEXTS = [
    ["I lost my keys this morning and I was late for work."],
    ["My dog died.", "I am so sorry.", "Thank you. He was fifteen, and he had been with me since school."],
    ["I passed my exam!"],
    ["Someone broke into my car last night.", "That is awful! Was anything taken?", "Everything."],
]


def real_batch(model: ECore, contexts: list[list[str]]) -> Batch:
    return context_batch(contexts, model.vocabulary, model.tables)
