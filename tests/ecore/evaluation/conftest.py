"""Prepared data: the sample corpus."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import pytest

from ecore.data.prepare import prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "prepared"
    with as_file(files("ecore.data") / "sample") as folder:
        prepare(folder, out, progress=False)
    return out
