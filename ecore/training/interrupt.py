"""Stop training after the current step on Ctrl-C, SIGTERM or SIGHUP; a second signal stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """While entered, the first SIGINT, SIGTERM or SIGHUP sets ``requested``; the second raises KeyboardInterrupt.

    A signal that is ignored, as nohup has SIGHUP, stays so.

    Python delivers signals to the main thread alone, so elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may arrive in the middle of another write to the same buffered stream.
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nfinishing this step, then writing a checkpoint (once more to stop at once)\n")
