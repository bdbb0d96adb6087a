"""Freed memory is kept: the next tensor of its size touches no new page."""

import os
import platform
import subprocess
import sys

import pytest

from ecore import cli
from ecore.training import allocator

LOOP = """
import resource, sys
import torch
from ecore.training.allocator import keep_freed_memory
torch.set_num_threads(1)
print(keep_freed_memory() if "keep" in sys.argv else None)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    for megabytes in (8, 48):  # more than glibc ever keeps by itself, too
        torch.empty(megabytes * 2**20, dtype=torch.uint8).fill_(1)
for _ in range(8):  # until the heap has grown
    touch()
before = faults()
for _ in range(4):
    touch()
print(faults() - before)
"""

glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc"
)


def ran(*arguments, **variables):
    chosen = {name: value for name, value in os.environ.items() if name not in allocator._CHOSEN}
    command = [sys.executable, "-c", LOOP, *arguments]
    done = subprocess.run(command, env=chosen | variables, capture_output=True, text=True, check=True)
    return done.stdout.split()


@glibc
def test_no_new_pages():
    taken, faults = ran("keep")
    assert taken == "True"
    assert int(faults) < 50
    assert int(ran()[1]) > 4 * 48 // 2  # even in huge pages of 2 MiB


@glibc
@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_the_environment_decides(name):
    value = "glibc.malloc.mmap_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    assert ran("keep", **{name: value})[0] == "False"


def test_another_c_library(monkeypatch):
    for name in allocator._CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()


def test_trainings_on_a_cpu_ask_for_it(monkeypatch, tmp_path, prepared_folder):
    asked = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: asked.append(True))
    command = ["train", "--data", str(prepared_folder), "--out", str(tmp_path / "run"), "--preset", "tiny"]
    assert cli.main([*command, "--device", "cpu", "--max-steps", "1", "--threads", "1"]) == 0
    assert asked == [True]
