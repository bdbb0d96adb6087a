"""A run's log in an experiment tracker, too: Weights & Biases, or trackio, which has its interface."""

from __future__ import annotations

import importlib
import sys
import uuid
from pathlib import Path
from typing import Any

from ecore.errors import InputError
from ecore.files import parse_json, read_bytes, write_json

TRACKERS = ("trackio", "wandb")
PROJECT = "ecore"
_FILE = "tracker.json"
"""In the run folder: the run's id, so that a resumed run continues its curves."""


class Tracker:
    """One tracker of one run. If it fails during training, training continues without it.

    Args:
        name: one of :data:`TRACKERS`.

    Raises:
        InputError: the package is not installed.
    """

    def __init__(self, name: str) -> None:
        if name not in TRACKERS:
            raise InputError(f"--log-to: expected one of {', '.join(TRACKERS)}, got {name!r}")
        self.name = name
        try:
            self._package: Any = importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"--log-to {name}: {error} (pip install {name})") from None
        self._id = uuid.uuid4().hex[:8]
        self._working = False

    def begin(self, run: Path, settings: dict[str, Any]) -> None:
        """Open the tracker's run, a new one or the one that :meth:`remember` wrote down.

        Args:
            settings: shown next to the curves.

        Raises:
            InputError: the tracker refuses, for instance for want of a login.
        """
        known = run / _FILE
        if known.exists():
            value = parse_json(read_bytes(known), str(known))
            if not isinstance(value, dict) or not isinstance(value.get("id"), str):
                raise InputError(
                    f'{known}: expected an object with the text "id"; delete it to begin new curves'
                )
            self._id = value["id"]
        options = {
            "project": PROJECT,
            "name": f"{run.resolve().name}-{self._id}",
            "config": settings,
            "resume": "allow",
        }
        if self.name == "wandb":  # trackio knows a run by its name
            options["id"] = self._id
        try:
            self._package.init(**options)
        except Exception as error:  # the package's own, of many kinds
            raise InputError(f"--log-to {self.name}: {_first_line(error)}") from None
        self._working = True

    def remember(self, run: Path) -> None:
        """Write the run's id into its folder."""
        write_json(run / _FILE, {"id": self._id})

    def log(self, values: dict[str, float], step: int) -> None:
        """Send one logged step's numbers."""
        self._attempt(lambda: self._package.log(values, step=step))

    def finish(self) -> None:
        """Send what is left."""
        self._attempt(self._package.finish)
        self._working = False

    def _attempt(self, send: Any) -> None:
        if not self._working:
            return
        try:
            send()
        except Exception as error:  # training is worth more than its curves
            self._working = False
            words = f"--log-to {self.name}: {_first_line(error)}; training continues without it"
            print(f"\necore: warning: {words}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
