"""Parts that all campaigns share: cases by number, their verdicts, the table of counts."""

from __future__ import annotations

import random
import shutil
import tempfile
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns import material
from tests.campaigns.material import Material


@dataclass(frozen=True)
class Verdict:
    """The result of a case: its kind, a word for its outcome, and the fault, "" where it is none."""

    kind: str
    outcome: str
    fault: str = ""


class Campaign(ABC):
    """Cases that are drawn from a seed and their number alone.

    Attributes:
        name: as on the command line.
        cases: how many there are by default.
    """

    name: str
    cases: int

    def __init__(self, root: Path, seed: int) -> None:
        self.seed = seed
        self.root = root
        self.material = self.make(root / "material")

    def make(self, root: Path) -> Material:
        """Make what the cases are about, once."""
        root.mkdir()
        return material.make(root)

    def close(self) -> None:  # noqa: B027
        """End what :meth:`make` started."""

    @abstractmethod
    def run(self, number: int, picks: random.Random, folder: Path) -> Verdict:
        """Run a case in an empty folder.

        Args:
            picks: the case's random numbers.
        """

    def verdict(self, number: int) -> Verdict:
        """The verdict on case ``number``; what it leaves is removed."""
        folder = self.root / f"case-{number}"
        folder.mkdir()
        try:
            return self.run(number, random.Random(f"{self.name}/{self.seed}/{number}"), folder)
        except Exception:  # a fault of the campaign, which must not end it
            return Verdict("campaign", "FAULT", traceback.format_exc(limit=-2).strip().replace("\n", " "))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def again(self, number: int) -> str:
        """The command that runs a case again."""
        return f"python -m tests.campaigns {self.name} --seed {self.seed} --case {number}"


def run(kind: type[Campaign], seed: int, numbers: list[int]) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Run cases; return their counts by kind and outcome, and a line for each fault."""
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    # In memory where that is possible: commands wait for the disk at every checkpoint.
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix=f"ecore-{kind.name}-", dir=memory if memory.is_dir() else None))
    try:
        with closing(kind(root, seed)) as campaign:
            for number in numbers:
                verdict = campaign.verdict(number)
                counts[verdict.kind, "FAULT" if verdict.fault else verdict.outcome] += 1
                if verdict.fault:
                    faults.append(f"{campaign.again(number)}  # {verdict.kind}: {verdict.fault}")
                    print(faults[-1], flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return counts, faults


def table(counts: Counter[tuple[str, str]]) -> str:
    """A row a kind, a column an outcome, and their sums."""
    outcomes = sorted({outcome for _, outcome in counts})
    kinds = sorted({kind for kind, _ in counts})
    width = max(map(len, [*kinds, "together"]))
    lines = [f"{'':{width}}" + "".join(f"{outcome:>12}" for outcome in outcomes)]
    for kind in kinds:
        lines.append(f"{kind:{width}}" + "".join(f"{counts[kind, outcome]:12,}" for outcome in outcomes))
    sums = [sum(counts[kind, outcome] for kind in kinds) for outcome in outcomes]
    return "\n".join([*lines, f"{'together':{width}}" + "".join(f"{total:12,}" for total in sums)])
