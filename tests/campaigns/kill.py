"""kill -9 at a random time, perhaps again while it goes on; then the same run ends as one that was never killed.

``ecore train`` mostly, whose losses and weights must be equal bit for bit; else ``prepare``, ``generate --split`` and
``annotate run``, whose results must be whole or absent, and right when the command is started again.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

from tests.campaigns.campaign import Campaign, Verdict
from tests.campaigns.forge import SUBPROCESS_EVERY, Child, fault
from tests.campaigns.material import TRAINING, Material

_SAME = ("step", "loss", "generation", "emotion", "correlation", "lr", "valid_ppl", "valid_ppl_per_sample")


class Kill(Campaign):
    """See the module."""

    name = "kill"
    cases = 300

    def make(self, root: Path) -> Material:
        made = super().make(root)
        self.commands = {
            "train": ["train", "--data", f"{root}/prepared", "--out", "new", *TRAINING],
            "prepare": [
                "prepare",
                "--data",
                f"{root}/corpus",
                "--out",
                "new",
                "--glove",
                f"{root}/glove.txt",
            ],
            "generate": [
                "generate",
                f"{root}/run",
                "--split",
                "test",
                "--out",
                "new.jsonl",
                "--threads",
                "1",
            ],
            "annotate": [
                "annotate",
                "run",
                "--data",
                f"{root}/prepared",
                "--annotator",
                "lexicon",
                "--out",
                "new",
            ],
        }
        self.expected: dict[str, object] = {}
        self.seconds: dict[tuple[str, bool], float] = {}
        for name in self.commands:
            self._time(name, False)
        return made

    def _time(self, name: str, new_process: bool) -> float:
        """Return the duration of a command that is not killed; its results are those to expect."""
        if (name, new_process) not in self.seconds:
            place = self.root / f"whole-{name}-{new_process}"
            place.mkdir()
            begin = time.monotonic()
            result = Child(self.commands[name], place, new_process=new_process).wait()
            assert result.code == 0, result.err
            self.seconds[name, new_process] = time.monotonic() - begin
            self.expected[name] = self._results(name, place)
        return self.seconds[name, new_process]

    def run(self, number: int, picks: random.Random, folder: Path) -> Verdict:
        name = picks.choices([*self.commands], [17, 1, 1, 1])[0]
        new_process = name == "train" and (number + 1) % SUBPROCESS_EVERY == 0
        command, kills = self.commands[name], 0
        for _ in range(picks.choice([1, 1, 2, 3])):
            if name == "prepare" and (folder / "new").exists():
                break
            child = Child(command, folder, new_process=new_process)
            time.sleep(picks.uniform(0, 1.05 * self._time(name, new_process)))
            kills += child.running()
            child.kill()
            result = child.wait()
            if result.code not in (0, -9):
                return Verdict(name, "FAULT", f"before kill -9: {fault(result) or result.err}")
            command = self._next(name, folder)
        outcome = f"{kills} kills" if kills != 1 else "1 kill"
        complaint = self._torn(name, folder, picks)
        if complaint:
            return Verdict(name, outcome, complaint)
        if name == "prepare" and (folder / "new").exists():  # whole: a second preparation is refused
            return Verdict(name, outcome, self._compared(name, folder))
        result = Child(command, folder, new_process=new_process).wait()
        if wrong := fault(result, codes=(0,)):
            return Verdict(name, outcome, f"after kill -9: {wrong}")
        return Verdict(name, outcome, self._compared(name, folder) or _leftovers(folder))

    def _next(self, name: str, folder: Path) -> Sequence[str]:
        """The command that goes on: the same one, but for a run that has begun."""
        if name == "train" and (folder / "new/config.json").exists():
            return ["train", "--out", "new", "--resume", "--threads", "1"]
        return self.commands[name]

    def _torn(self, name: str, folder: Path, picks: random.Random) -> str:
        """All that can be seen of a torn result before the command is started again."""
        if name == "train" and (folder / "new/checkpoints.json").exists() and picks.random() < 0.3:
            argv = picks.choice(
                [["info", "new"], ["generate", "new", "--text", "my dog died.", "--threads", "1"]]
            )
            if wrong := fault(Child(argv, folder).wait(), codes=(0,)):
                return f"the killed run is of no use: {argv[0]}: {wrong}"
        return self._compared(name, folder) if name == "generate" and (folder / "new.jsonl").exists() else ""

    def _results(self, name: str, folder: Path) -> object:
        new = folder / "new"
        if name == "train":
            lines = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
            pointers = json.loads((new / "checkpoints.json").read_text())
            weights = {key: (new / f"{pointers[key]}.safetensors").read_bytes() for key in ("best", "last")}
            names = sorted(path.name for path in new.iterdir() if not path.name.startswith("events"))
            return [{key: line.get(key) for key in _SAME} for line in lines], weights, names
        files = [folder / "new.jsonl"] if name == "generate" else sorted(new.iterdir())
        return [(path.name, path.read_bytes()) for path in files]

    def _compared(self, name: str, folder: Path) -> str:
        return (
            "" if self._results(name, folder) == self.expected[name] else "other results than without a kill"
        )


def _leftovers(folder: Path) -> str:
    """Temporary files that nobody has swept; those of a file written elsewhere than in a run stay until then."""
    left = [path for path in (folder / "new").glob(".*") if path.name != ".lock"]
    return f"left behind: {left[0].name}" if left else ""
