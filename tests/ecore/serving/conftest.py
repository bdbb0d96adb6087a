"""A small model, and a server for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from ecore.pipeline import ECore
from tests.ecore.generation.dialogues import differing_model

if TYPE_CHECKING:
    from tests.ecore.serving.server import Server


@pytest.fixture(scope="module")
def model() -> ECore:
    return ECore(differing_model("soft"))


@pytest.fixture(scope="module")
def server(model: ECore) -> Iterator[Server]:
    from tests.ecore.serving.server import serving  # where the tests' packages are there

    with serving(model) as server:
        yield server
