"""Python code in processes that have imported torch already: that takes longer than what most of them do.

It is for code that wants a process of its own, and not for what starting Python or importing torch does.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = """
import json, os, signal, sys, traceback
import torch

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(job["seconds"])
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, path in ((1, job["out"]), (2, job["err"])):
                os.dup2(os.open(path, os.O_WRONLY), number)
            os.environ.clear()
            os.environ.update(job["environment"])
            os.chdir(job["folder"])
            exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server(python_path: str) -> subprocess.Popen[str]:
    """The process that forks; it ends with this one, when its standard input does."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(
    code: str, environment: Mapping[str, str], folder: Path | None = None, seconds: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run code as ``python -c`` does, without input, in a process with these variables, which has one thread.

    Args:
        environment: with PYTHONPATH.
        folder: where it runs; None for this process's.
        seconds: after which it is killed.
    """
    server = _server(environment["PYTHONPATH"])
    with tempfile.TemporaryDirectory() as printed:
        files = [Path(printed, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        out, err = map(str, files)
        job: dict[str, object] = {
            "code": code,
            "environment": dict(environment),
            "folder": str(folder or Path.cwd()),
        }
        job |= {"out": out, "err": err, "seconds": seconds}
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        returned = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, returned, *(file.read_text() for file in files))
