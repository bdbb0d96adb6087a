"""The dialogue of ``ecore chat``: lines in, answers out, and commands."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ecore.cli.common import shown
from ecore.conversation import Conversation
from ecore.errors import InputError
from ecore.generation.decoding import METHODS, Decoding
from ecore.pipeline import ECore, Reply

EMOTIONS = 8
"""Emotions that /emotions shows."""


class Chat:
    """A dialogue in the terminal.

    Args:
        model: answers.
        options: decoding that was given.
        transcript: file that every exchange is appended to; None keeps none.
    """

    def __init__(self, model: ECore, options: dict[str, Any], transcript: Path | None) -> None:
        self._talk = Conversation(model, **options)
        self._options, self._transcript = options, transcript
        self._asks = sys.stdin.isatty()
        self._colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        hard = model.model.config.strategy == "hard"  # elsewhere all emotions guide, or none
        self._mark = "co-occurring: these guide the answer" if hard else "those with the highest attention"
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/undo": ("takes the last exchange back", self._undo),
            "/reset": ("forgets the dialogue", self._reset),
            "/emotions": ("shows what was perceived in the dialogue", self._emotions),
            "/method": (f"NAME ({', '.join(METHODS)}) changes how answers are found", self._method),
            "/help": ("lists the commands", self._help),
            "/quit": ("leaves", self._help),
        }

    def run(self) -> int:
        """Talk until the input ends; returns the exit code."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a byte that is no text should not end the dialogue
        if self._asks:
            print("Tell me about it. (/help lists the commands, /quit leaves.)")
        try:
            while True:
                line = input("you: " if self._asks else "").strip()
                if line == "/quit":
                    return 0
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._say(line)
        except (EOFError, KeyboardInterrupt):
            if self._asks:
                print("\nGoodbye.")
            return 0

    def _say(self, line: str) -> None:
        reply = self._talk.say(line)
        perceived = f"\n       {self._dim('[' + shown(reply.emotions) + ']')}" if reply.emotions else ""
        print(f"ecore: {reply}{perceived}", flush=True)
        self._note(
            {"user": line, "ecore": str(reply), "emotions": reply.emotions, "relevant": reply.relevant}
        )

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        _, act = self._commands.get(name, ("", self._help))
        act(rest.strip())

    def _undo(self, _: str) -> None:
        taken = self._talk.undo()
        print("(nothing to take back)" if taken is None else f"(taken back: {taken})")
        if taken is not None:
            self._note({"undo": taken})

    def _reset(self, _: str) -> None:
        self._talk.reset()
        print("(forgotten)")
        self._note({"reset": True})

    def _emotions(self, _: str) -> None:
        if not self._talk.replies:
            print("(nothing was said yet)")
            return
        last: Reply = self._talk.replies[-1]
        if not last.emotions:
            print("(this model perceives no emotions)")
            return
        width = max(len(name) for name, _ in last.emotions[:EMOTIONS])
        for name, share in last.emotions[:EMOTIONS]:
            mark = " *" if name in last.relevant else ""
            print(f"  {name:<{width}} {100 * share:5.1f} % {'█' * round(20 * share)}{mark}")
        print(f"  * {self._mark}")

    def _method(self, name: str) -> None:
        # Options of another method, which a Decoding refuses, rest until it is back.
        options = {**self._options, "method": name}
        if name != "sample":
            options = {k: v for k, v in options.items() if k not in ("top_k", "top_p", "temperature")}
        try:
            Decoding(**options)
        except InputError as error:
            print(f"({error})")
            return
        self._talk.decoding = options
        print(f"(answers by {name} from now on)")

    def _help(self, _: str) -> None:
        for name, (what, _act) in self._commands.items():
            print(f"  {name:<10} {what}")

    def _dim(self, text: str) -> str:
        return f"\033[2m{text}\033[0m" if self._colours else text

    def _note(self, record: dict[str, Any]) -> None:
        if self._transcript is None:
            return
        stamped = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **record}
        with self._transcript.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stamped, ensure_ascii=False) + "\n")
