"""Rows: the result of one call on one backend."""

from __future__ import annotations

import dataclasses
from typing import ClassVar


@dataclasses.dataclass
class Row:
    """Result of one call on one backend.

    Attributes:
        verdict: "right", "wrong", "failed" (an exception) or "refused".
        error, allowed, tensor: of the tensor whose error is the largest share of what is allowed; relative to the size
            of that tensor. None if nothing was compared; ``error`` is also None if an element is not finite.
        same_bits: True if a second run gave the same.
        reason: why the verdict is not "right".
    """

    operator: str
    variant: str
    depth: int
    backend: str
    masks: str
    precision: str
    nodes: int
    verdict: str = "failed"
    error: float | None = None
    allowed: float | None = None
    tensor: str = ""
    same_bits: bool | None = None
    seconds: float = 0.0
    reason: str = ""

    COLUMNS: ClassVar[str] = (
        f"{'operator':36} {'layers':>6} {'N':>4} {'words':5} {'precision':9} {'backend':9} "
        f"{'error':>8} {'allowed':>8} {'bits':5} {'s':>5}  verdict, worst tensor"
    )

    def __str__(self) -> str:
        name = f"{self.operator} {self.variant}".strip()
        error, allowed = (f"{x:8.1e}" if x is not None else f"{'':8}" for x in (self.error, self.allowed))
        bits = {True: "same", False: "DIFFER", None: ""}[self.same_bits]
        verdict = self.verdict if self.verdict in ("right", "refused") else self.verdict.upper()
        detail = self.reason or self.tensor
        return (
            f"{name:36} {self.depth:6} {self.nodes:4} {self.masks:5} {self.precision:9} {self.backend:9} "
            f"{error} {allowed} {bits:5} {self.seconds:5.2f}  {verdict}: {detail}"
        ).rstrip(": ")
