"""The kernels that have no launch table compile for a GPU, fit, and do not spill."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton's compiler")

EVERYWHERE = os.environ.get("ECORE_COMPILE_EVERYWHERE") == "1"


def test_the_kernels_compile_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    architectures = ("80", "86", "89", "90") if EVERYWHERE else ("86",)
    command = [sys.executable, "-m", "tests.kernels.triton.compile_step_operators", *architectures]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 7 * 3 * len(architectures)
    for name, kind, _, _, spills, shared in rows:
        assert int(spills) == 0, (name, kind)
        assert int(shared) <= 101_376, (name, kind)
