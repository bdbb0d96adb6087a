"""Sessions whose processes stand in for a stage's own."""

import os
import sys

import pytest

from benchmarks.gpu.runner import Process, Session


@pytest.fixture
def session(tmp_path):
    (tmp_path / "scratch").mkdir()
    session = Session(tmp_path / "out", tmp_path / "scratch", dict(os.environ), {"gpu": "a GPU"})
    session.begin_stage("stage", 120.0)
    return session


@pytest.fixture
def python():
    """A process that runs a piece of code."""

    def make(name, code, seconds=60.0, **options):
        return Process(name, [sys.executable, "-c", code], seconds, **options)

    return make
