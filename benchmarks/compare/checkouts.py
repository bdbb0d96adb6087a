"""Two commits checked out and built in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ecore.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("csrc", "CMakeLists.txt", "setup.py")
"""Paths that determine the compiled extension; where they do not differ, one build serves both commits."""


def git(*arguments: str) -> str:
    """Return what git prints in this repository.

    Raises:
        InputError: git is missing or fails; with its last line.
    """
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"compare: git does not run ({error.strerror}), and commits come from it") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise InputError(f"compare: git {' '.join(arguments)}: {said[-1]}")
    return done.stdout.strip()


def commit(revision: str) -> str:
    """Return the full hash of the commit that ``revision`` names.

    Raises:
        InputError: it names none in this repository.
    """
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except InputError as error:
        if "no reason given" not in str(error):
            raise
        raise InputError(
            f"compare: {revision}: expected a commit, branch or tag of the repository in {ROOT}"
        ) from error


@contextlib.contextmanager
def checkouts(base: str, head: str) -> Iterator[tuple[Path, Path]]:
    """The two commits' trees with their extensions built, gone when done.

    Raises:
        InputError: the extension of one does not build.
    """
    with tempfile.TemporaryDirectory(prefix="ecore-compare-") as folder:
        trees = Path(folder, "base"), Path(folder, "head")
        try:
            for tree, revision in zip(trees, (base, head), strict=True):
                git("worktree", "add", "--quiet", "--detach", str(tree), revision)
            build(trees[0])
            if git("diff", "--name-only", base, head, "--", *BUILT_FROM):
                build(trees[1])
            else:
                for extension in built(trees[0]):
                    shutil.copy2(extension, trees[1] / extension.relative_to(trees[0]))
            yield trees
        finally:
            for tree in trees:
                subprocess.run(
                    ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], capture_output=True
                )


def built(tree: Path) -> list[Path]:
    """Return the compiled extensions in a tree."""
    return sorted(Path(tree, "kernels", "ecore_kernels").glob("_native*.so"))


def build(tree: Path) -> None:
    """Compile the extension of a tree into it, with the tree's own setup.py.

    Raises:
        InputError: that fails; with the last line of the report.
    """
    print(f"compare: building the extension of {tree.name}", file=sys.stderr, flush=True)
    log = tree.parent / f"{tree.name}.log"
    with log.open("w") as report:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=tree, env=environment(tree), stdout=report, stderr=subprocess.STDOUT
        )
    if done.returncode or not built(tree):
        lines = log.read_text(errors="replace").strip().splitlines() or ["no reason given"]
        raise InputError(f"compare: the extension of {tree.name} does not build: {lines[-1]}")


def environment(tree: Path) -> dict[str, str]:
    """Return this process's environment with the tree's packages first on Python's path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")])}
