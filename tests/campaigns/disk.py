"""Bad places to write: full disks, read-only folders, mount points, links, no rights, something in the way.

A command works, or says in one line which file or folder it cannot write, with exit code 2, and leaves no half result;
what was there stays. A disk that was full is given room: then the same command ends as if it had always had it.

Disks are small tmpfs in a mount namespace of the command's own; where none may be made, a limit on the size of files
stands in for a full disk, and the other disks are left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import random
import resource
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.campaigns import material
from tests.campaigns.campaign import Campaign, Verdict
from tests.campaigns.forge import Child, fault
from tests.campaigns.material import TRAINING, Material

_NEWNS, _NEWUSER = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _PRIVATE = 1, 32, 4096, (1 << 18) | 16384
_NOBODY = 65534
SIZES = {"full": (4, 400), "mount point": (20_000, 20_000)}
"""Least and greatest size of a disk, in KiB."""
PLACES = (
    "full",
    "read-only",
    "mount point",
    "rights",
    "link",
    "dangling link",
    "loop",
    "file",
    "holds something",
)


class Disk(Campaign):
    """See the module."""

    name = "disk"
    cases = 120

    def make(self, root: Path) -> Material:
        made = super().make(root)
        # Without rights, nothing more can be imported.
        material.said(["figures", "run", "--only", "training", "--out", "figures"], root)
        for folder in (root.parent, root):
            folder.chmod(0o755)  # for the cases without rights
        m, t, few, plan = str(root), ["--threads", "1"], ["--contexts", "4"], ["--preset", "tiny", "--plan"]
        predictions = f"{m}/run/evaluation-test/predictions.jsonl"
        self.commands: dict[str, Sequence[str]] = {
            "prepare": ["prepare", "--data", f"{m}/corpus", "--glove", f"{m}/glove.txt", "--out", "NEW"],
            "train": ["train", "--data", f"{m}/prepared", *TRAINING, "--out", "NEW"],
            "evaluate": ["evaluate", f"{m}/run", *t, "--out", "NEW"],
            "generate": ["generate", f"{m}/run", "--split", "test", *t, "--out", "NEW"],
            "annotate run": [
                "annotate",
                "run",
                "--data",
                f"{m}/corpus",
                "--annotator",
                "lexicon",
                "--out",
                "NEW",
            ],
            "annotate review": ["annotate", "review", f"{m}/annotated", "--out", "NEW"],
            "human export": [
                "human",
                "export",
                f"A={predictions}",
                f"B={m}/other.jsonl",
                *few,
                "--out",
                "NEW",
            ],
            "human score": [
                "human",
                "score",
                f"{m}/study",
                f"{m}/rating-1.csv",
                f"{m}/ab-1.csv",
                "--out",
                "NEW",
            ],
            "figures": ["figures", f"{m}/run", "--only", "training", "--out", "NEW"],
            "reproduce": ["reproduce", "table4", "--data", f"{m}/prepared", *plan, "--out", "NEW"],
        }
        self.expected: dict[str, Any] = {}
        return made

    def run(self, number: int, picks: random.Random, folder: Path) -> Verdict:
        name = picks.choice([*self.commands, "train", "train", "prepare"])
        kind = picks.choice([*PLACES, "full", "full"])
        if kind in ("read-only", "mount point") and not may_mount():
            return Verdict(kind, "left out")
        if kind == "rights" and os.geteuid() != 0:
            return Verdict(kind, "left out")
        folder.chmod(0o777 if kind != "rights" else 0o755)
        place = folder / "disk"
        place.mkdir(mode=0o755)
        new = place / "new"
        argv = [str(new) if word == "NEW" else word for word in self.commands[name]]
        kibibytes = picks.randint(*SIZES.get(kind, (1, 1)))
        if picks.random() < 0.5 and kind == "full":
            kibibytes = max(4, kibibytes // 10)
        self._put(kind, place, new)
        before = _content(place)
        note = folder / "after.json"
        note.touch(0o666)
        note.chmod(0o666)
        child = Child(
            argv,
            folder,
            prelude=partial(_arrange, kind, place, new, kibibytes),
            epilogue=partial(_look, kind, place, new, note, argv),
        )
        result = child.wait()
        what = f"{name}, {kind}" + (f" of {kibibytes} KiB" if kind == "full" else "")
        wrong = fault(result)
        if not wrong:
            wrong = self._judged(name, kind, result.code, result.err, json.loads(note.read_text()), before)
        return Verdict(kind, "refused" if result.code else "works", wrong and f"{what}: {wrong}")

    def _put(self, kind: str, place: Path, new: Path) -> None:
        """Make what stands in the place, but for mounts."""
        if kind == "link":
            (place / "other").mkdir()
            new.symlink_to("other")
        elif kind == "dangling link":
            new.symlink_to("missing")
        elif kind == "loop":
            new.symlink_to("new")
        elif kind == "file":
            new.write_text("somebody's")
        elif kind == "holds something":
            new.mkdir()
            (new / "thesis.tex").write_text("somebody's")
        elif kind == "mount point":
            new.mkdir()

    def _judged(
        self, name: str, kind: str, code: int, said: str, after: dict[str, Any], before: dict[str, str]
    ) -> str:
        for file, text in before.items():
            replaced = kind == "file" and not code  # a file by a file
            if not replaced and after["content"].get(file) != text:
                return f"{file} was there and is changed or gone"
        hidden = [file for file in after["content"] if Path(file).name.startswith(".")]
        if left := [file for file in hidden if not file.endswith(".lock")]:
            return f"left behind: {left[0]}"
        if not code:
            return ""
        if "disk" not in said:
            return f"the message names no file: {said.strip()[-200:]}"
        halves = [file for file in after["content"] if file not in before]
        if halves and name in ("prepare", "generate", "annotate review", "human export", "human score"):
            return f"half a result: {halves[0]}"
        if kind != "full":
            return ""
        if after["again"] != 0:
            return f"with room again exit code {after['again']}: {after['said'][-300:]}"
        if name == "train":
            if "train" not in self.expected:
                where = self.root / "whole"
                where.mkdir()
                Child([str(where / "new") if w == "NEW" else w for w in self.commands["train"]], where).wait()
                self.expected["train"] = _losses(where / "new/metrics.jsonl")
            if after["losses"] != self.expected["train"]:
                return "with room again it has other losses than with room all the time"
        return ""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: Path, kind: str | None, flags: int, data: str = "") -> None:
    done = _libc().mount(
        source.encode(), str(target).encode(), kind and kind.encode(), ctypes.c_ulong(flags), data.encode()
    )
    if done:
        raise OSError(ctypes.get_errno(), "mount", str(target))


def _own_mounts() -> None:
    """A mount namespace of this process's own, with a user namespace where it is needed."""
    user, group = os.geteuid(), os.getegid()
    if _libc().unshare(_NEWNS | (0 if user == 0 else _NEWUSER)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", Path("/"), None, _PRIVATE)


@cache
def may_mount() -> bool:
    """Return True if processes may have mounts of their own here."""
    pid = os.fork()
    if pid == 0:
        try:
            _own_mounts()
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _arrange(kind: str, place: Path, new: Path, kibibytes: int) -> None:
    if kind in ("full", "read-only", "mount point") and may_mount():
        _own_mounts()
        target = new if kind == "mount point" else place
        _mount("tmpfs", target, "tmpfs", 0, f"size={max(kibibytes, 4)}k,mode=755")
        if kind == "read-only":
            _mount("tmpfs", target, None, _REMOUNT | _READ_ONLY)
    elif kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kibibytes, resource.RLIM_INFINITY))
    elif kind == "rights":
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)


def _look(kind: str, place: Path, new: Path, note: Path, argv: Sequence[str], code: int) -> None:
    """Note what the command left and, where the disk was full, how it ends with more room."""
    found: dict[str, Any] = {"content": _content(place)}
    if kind == "full" and code:
        if may_mount():
            _mount("tmpfs", place, None, _REMOUNT, "size=100m")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if argv[0] == "train" and (new / "config.json").exists():
            argv = ["train", "--resume", "--out", str(new), "--threads", "1"]
        from ecore.cli import main

        words = io.StringIO()
        with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            try:
                found["again"] = main(argv)
            except Exception as error:
                found["again"] = repr(error)
        found["said"] = words.getvalue()
        found["losses"] = _losses(new / "metrics.jsonl") if argv[0] == "train" else None
    note.write_text(json.dumps(found))


def _content(place: Path) -> dict[str, str]:
    """Files by name, with what is in them or where they lead."""
    found = {}
    for path in place.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(place))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(place))] = path.read_bytes()[:100].hex()
    return found


def _losses(path: Path) -> list[Any] | None:
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [[line["step"], line["loss"], line.get("valid_ppl")] for line in lines]
