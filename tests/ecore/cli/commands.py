"""Calls of the command line."""

import os
import subprocess
import sys
from pathlib import Path

from ecore import cli
from tests.sizes import TINY_MODEL

ROOT = Path(__file__).parents[3]

SMALL = [*TINY_MODEL, "--batch-size", "8", "--warmup", "5", "--threads", "1"]


def refused(capsys, *arguments, code=2):
    """The one line that the command prints; any traceback would be an exception here."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("ecore: error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err + out
    return lines[0]


def python(*arguments, **options):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)
