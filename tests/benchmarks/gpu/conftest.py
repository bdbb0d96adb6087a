"""Sessions whose processes stand in for a stage's own."""

import os
import sys
import time
from pathlib import Path

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


@pytest.fixture
def ends():
    """Return True if a process ends within seconds; a zombie, whose parent has not waited for it, has ended."""

    def wait(pid, seconds=10.0):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                return True
            if state == "Z":
                return True
            time.sleep(0.05)
        return False

    return wait
