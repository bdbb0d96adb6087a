"""A study of three systems, and its sheets as three raters finish them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecore.paper.human.sheets import KINDS
from ecore.paper.human.study import export
from tests.ecore.paper.human.raters import CONTEXTS, SYSTEMS, fill, record, save, write


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("predictions")
    return {s: write(folder / f"{s}.jsonl", [record(s, i) for i in range(CONTEXTS)]) for s in SYSTEMS}


@pytest.fixture(scope="session")
def study(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    export(files, out, contexts=CONTEXTS)
    return out


@pytest.fixture(scope="session")
def finished(study: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("finished")
    names = [(kind, rater) for kind in KINDS for rater in (1, 2, 3)]
    return {f"{k}-{r}": save(folder / f"{k}-{r}.csv", fill(study, k, r)) for k, r in names}
