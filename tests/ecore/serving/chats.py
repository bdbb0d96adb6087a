"""Bodies of chats, and a model that waits until it may answer."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from ecore.data.vocabulary import EOS
from ecore.pipeline import ECore
from tests.ecore.generation.dialogues import CONTEXTS

ROLES = ("user", "assistant")


def messages(turns: list[str]) -> list[dict[str, str]]:
    return [{"role": ROLES[i % 2], "content": turn} for i, turn in enumerate(turns)]


HELLO = {"messages": messages(CONTEXTS[0])}


class Gate:
    """Holds the model at each step until it is opened; a word takes ``seconds`` then, and no answer ends early."""

    def __init__(self, model: ECore, seconds: float = 0.0) -> None:
        self.opened, self.steps, self.contexts = threading.Event(), 0, 0
        step, read = model.model.step, model.model.read

        def gated(*arguments: Any) -> torch.Tensor:
            assert self.opened.wait(30)
            self.steps += 1
            time.sleep(seconds)
            scores = step(*arguments)
            scores[:, EOS] = -100.0
            return scores

        def counted(contexts: Any) -> Any:
            self.contexts += len(contexts)
            return read(contexts)

        model.model.step, model.model.read = gated, counted  # type: ignore[method-assign]
