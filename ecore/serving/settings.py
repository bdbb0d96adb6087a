"""Settings of the server; light, for the command line."""

from __future__ import annotations

from dataclasses import dataclass

from ecore.config import setting
from ecore.ranges import check

LONGEST = 256
"""Words that one answer may have, whatever a request wants."""


@dataclass(frozen=True)
class Serving:
    """Settings of batching and its bounds.

    Raises:
        InputError: a value out of range.
    """

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every network of this machine")
    port: int = setting(8000, "port to listen on; 0 takes a free one")
    batch_size: int = setting(64, "requests that are answered at once, at most")
    wait_ms: float = setting(4.0, "milliseconds that the first request of a batch waits for others")
    queue: int = setting(256, "requests that may wait; more are refused with 429 and Retry-After")

    def __post_init__(self) -> None:
        check(self)
