"""One bit of a prepared folder, a run or a log is flipped: commands give the same results, or one line and exit code 2.

Not covered: TensorBoard's events, which no command reads, and what others may write: predictions, labels, sheets.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns import material
from tests.campaigns.campaign import Campaign, Verdict
from tests.campaigns.forge import SUBPROCESS_EVERY, Child, Result, fault
from tests.campaigns.material import TEXT, TRAINING, Material

UNCOVERED = ("events.out.tfevents",)
_VARIES = re.compile(r"\d[\d,.]* s\b|[\d,.]+ MiB|(?<=\d )[\d,.]+ (samples|ms)/?\w*")
_TIMES = ("samples_per_second", "seconds_per_step", "peak_memory_mib", "valid_seconds", "seconds", "crc32")


@dataclass(frozen=True)
class Probe:
    """A command that reads a folder, and the files of its results, whose content counts besides what it prints."""

    folder: str
    argv: Sequence[str]
    results: Sequence[str] = ()
    stdin: bytes = b""


THREADS = ("--threads", "1")
PROBES = {
    "train": Probe(
        "prepared", ["train", "--data", "prepared", "--out", "new", *TRAINING, "--max-steps", "2"], ["new"]
    ),
    "annotate": Probe(
        "prepared",
        ["annotate", "run", "--data", "prepared", "--annotator", "lexicon", "--out", "new"],
        ["new"],
    ),
    "generate": Probe("run", ["generate", "run", "--text", TEXT, *THREADS]),
    "chat": Probe("run", ["chat", "run", "--checkpoint", "last", *THREADS], stdin=f"{TEXT}\n".encode()),
    "evaluate": Probe("run", ["evaluate", "run", "--data", "prepared", "--out", "new", *THREADS], ["new"]),
    "resume": Probe("run", ["train", "--out", "run", "--resume", "--max-steps", "8", *THREADS], ["run"]),
    "info": Probe("run", ["info", "run"]),
    "curves": Probe("run", ["figures", "run", "--out", "new", "--only", "training"], ["new/training.json"]),
    "backbone": Probe("gpt2-run", ["generate", "gpt2-run", "--text", TEXT, *THREADS]),
}
READS = {"metrics.jsonl": ("resume", "info", "curves"), ".state.": ("resume",)}
"""Probes of files that only these read; of others any of the folder's."""


class Flip(Campaign):
    """See the module."""

    name = "flip"
    cases = 500

    def make(self, root: Path) -> Material:
        made = super().make(root)
        self.backbones = importlib.util.find_spec("transformers") is not None
        self.expected: dict[str, str] = {}
        return made

    def run(self, number: int, picks: random.Random, folder: Path) -> Verdict:
        damaged = picks.choice(["prepared", "run", "run", "gpt2-run"])
        if damaged == "gpt2-run" and not self.backbones:
            damaged = "run"
        elif not (self.material.root / damaged).exists():
            material.make_backbone(self.material)
        paths = sorted(
            path.relative_to(self.material.root)
            for path in (self.material.root / damaged).rglob("*")
            if path.is_file() and not path.name.startswith(UNCOVERED) and "evaluation" not in str(path)
        )
        file = picks.choice(paths)
        readers = next((names for part, names in READS.items() if part in file.name), tuple(PROBES))
        name = picks.choice(
            [n for n in PROBES if PROBES[n].folder == damaged and n in readers] or ["backbone"]
        )
        content = bytearray((self.material.root / file).read_bytes())
        bit = picks.randrange(8 * len(content))
        if picks.random() < 0.3:  # headers are small, and the worst
            bit = picks.randrange(8 * min(len(content), 200))
        content[bit // 8] ^= 1 << bit % 8
        if name not in self.expected:
            (folder / "whole").mkdir()
            result, found = self._probe(PROBES[name], folder / "whole", None, b"", False)
            assert result.code == 0, result.err
            self.expected[name] = found
        place = folder / "damaged"
        place.mkdir()
        result, found = self._probe(
            PROBES[name], place, file, bytes(content), (number + 1) % SUBPROCESS_EVERY == 0
        )
        kind = (
            f"{damaged}: {re.sub(r'[0-9]{6}', 'N', file.name)}"
            if damaged != "prepared"
            else "prepared folder"
        )
        wrong = fault(result)
        if not wrong and result.code == 0 and found != self.expected[name]:
            wrong = f"{file}, bit {bit}: {name} gives other results in silence"
        elif wrong:
            wrong = f"{file}, bit {bit}: {name}: {wrong}"
        return Verdict(kind, "refused" if result.code else "same", wrong)

    def _probe(
        self, probe: Probe, place: Path, file: Path | None, content: bytes, new_process: bool
    ) -> tuple[Result, str]:
        """The result of a probe on a copy, in which ``file`` has another ``content``, and a digest of what it gave."""
        for name in ("prepared", probe.folder):
            if not (place / name).exists():
                shutil.copytree(self.material.root / name, place / name)
        if file is not None:
            (place / file).write_bytes(content)
        result = Child(probe.argv, place, stdin=probe.stdin, new_process=new_process).wait()
        digest = hashlib.sha256(_VARIES.sub("", result.out).encode())
        for name in probe.results:
            target = place / name
            for path in sorted(target.rglob("*")) if target.is_dir() else [target]:
                if path.is_file() and not path.name.startswith(UNCOVERED) and path.name != "checkpoints.json":
                    digest.update(path.name.encode() + _content(path))
        return result, digest.hexdigest()


def _content(path: Path) -> bytes:
    """Return the content of a file that counts: all but times, and the state of training, whose notes hold them."""
    content = path.read_bytes()
    if path.name in ("vocabulary.json", "config.json") or ".state." in path.name:
        return b""
    if path.suffix not in (".json", ".jsonl"):
        return content
    kept = []
    for line in content.splitlines() if path.suffix == ".jsonl" else [content]:
        try:
            value = json.loads(line)
        except ValueError:
            return content
        kept.append({k: v for k, v in value.items() if k not in _TIMES} if isinstance(value, dict) else value)
    return json.dumps(kept).encode()
