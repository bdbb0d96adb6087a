"""Prepared data: the sample corpus, and EmpatheticDialogues where ECORE_DATA names the data folder."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def ed_prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "ECORE_DATA" not in os.environ:
        pytest.skip("ECORE_DATA does not name the folder of EmpatheticDialogues")
    out = tmp_path_factory.mktemp("ed") / "prepared"
    prepare(Path(os.environ["ECORE_DATA"]) / "ed", out, progress=False)
    return out
