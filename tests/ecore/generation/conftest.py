"""A real model, small, that answers differently."""

from __future__ import annotations

import pytest

from ecore.model import ECore
from tests.ecore.generation.dialogues import differing_model


@pytest.fixture(scope="module", params=["soft", "hard"])
def real(request: pytest.FixtureRequest) -> ECore:
    """See :func:`tests.ecore.generation.dialogues.differing_model`."""
    return differing_model(request.param)
