"""Commands in forked children of a process that has imported everything, and for a share of them in new processes.

Importing torch takes seconds, and a campaign runs hundreds of commands. A forked child runs :func:`ecore.cli.main` as
the command does, with files for its streams; a campaign runs each :data:`SUBPROCESS_EVERY`-th case as a real command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUBPROCESS_EVERY = 25
HANGS = 120.0
"""Seconds after which a command counts as hanging."""


@dataclass(frozen=True)
class Result:
    """The end of a command: exit code (negative: killed by that signal), what it said, whether it hung."""

    code: int
    out: str
    err: str
    hung: bool = False

    @property
    def complaints(self) -> list[str]:
        """The lines that say what is wrong."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return [line for line in lines if line.startswith("ecore") and ": error: " in line]


def environment() -> dict[str, str]:
    """The environment of commands: this tree, one thread, no key."""
    mine = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**mine, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def warm_up() -> None:
    """Import what commands import, so that children need not."""
    import torch

    torch.set_num_threads(1)
    import ecore_kernels.info  # noqa: F401


class Child:
    """A command that runs; :meth:`wait` for it, or :meth:`kill` it.

    Args:
        argv: the command's arguments, without ``ecore``.
        prelude: called first in a forked child: limits, mounts, patches. With one the command is always forked.
        epilogue: called with the exit code, last.
        new_process: a real command instead of a forked child.
        extra: environment variables beside :func:`environment`.
    """

    def __init__(
        self,
        argv: Sequence[str],
        cwd: Path,
        *,
        stdin: bytes = b"",
        prelude: Callable[[], object] | None = None,
        epilogue: Callable[[int], object] | None = None,
        new_process: bool = False,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self._streams = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        self._streams[0].write(stdin)
        self._streams[0].seek(0)
        self._code: int | None = None
        variables = {**environment(), **(extra or {})}
        if new_process and prelude is None:
            files = dict(zip(("stdin", "stdout", "stderr"), self._streams, strict=True))
            command = [sys.executable, "-m", "ecore", *argv]
            self._process = subprocess.Popen(command, cwd=cwd, env=variables, start_new_session=True, **files)
            self.pid = self._process.pid
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(argv, cwd, variables, prelude, epilogue)

    def _run(
        self,
        argv: Sequence[str],
        cwd: Path,
        variables: Mapping[str, str],
        prelude: Callable[[], object] | None,
        epilogue: Callable[[int], object] | None,
    ) -> None:
        code = 1
        try:
            os.setsid()
            for number, stream in enumerate(self._streams):
                os.dup2(stream.fileno(), number)
            for number, mode in enumerate("rww"):
                name = ("stdin", "stdout", "stderr")[number]
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
            os.environ.clear()
            os.environ.update(variables)
            os.chdir(cwd)
            if prelude is not None:
                prelude()
            from tqdm import tqdm

            from ecore.cli import main

            tqdm.set_lock(threading.RLock())  # its own is shared by forked processes, and one may die with it
            code = main(argv)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
                if epilogue is not None:
                    epilogue(code)
            finally:
                os._exit(code)

    def running(self) -> bool:
        """True until it has ended."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is None

    def ended(self, seconds: float) -> bool:
        """True if it ends within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.running()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it and its children a signal."""
        if self.running():
            os.killpg(self.pid, number)

    def wait(self, seconds: float = HANGS) -> Result:
        """Its result; one that takes longer is killed, and hung."""
        deadline, pause = time.monotonic() + seconds, 0.001
        while self.running() and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        hung = self.running()
        if hung:
            self.kill()
            while self.running():
                time.sleep(0.01)
        texts = []
        for stream in self._streams[1:]:
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
        for stream in self._streams:
            stream.close()
        assert self._code is not None
        return Result(self._code, *texts, hung)


def fault(result: Result, codes: Sequence[int] = (0, 2)) -> str:
    """Return the fault of a result that no user may see; "" where it is one.

    A refusal is exit code 2 and one line; argparse's own stand below a line of usage.
    """
    if result.hung:
        return f"hangs: no end within {HANGS:.0f} s"
    if "Traceback (most recent call last)" in result.out + result.err:
        return f"traceback: {result.err.strip().splitlines()[-1][:200]}"
    if result.code not in codes:
        return f"exit code {result.code}: {(result.err.strip().splitlines() or ['nothing said'])[-1][:200]}"
    if result.code in (1, 2) and len(result.complaints) != 1:
        return (
            f"exit code {result.code} with {len(result.complaints)} lines that say why: {result.err[-200:]!r}"
        )
    if not all(
        line.isprintable() for line in result.complaints
    ):  # a terminal would obey what a message quotes
        return f"control characters in the message: {result.complaints[0][:200]!r}"
    return ""
