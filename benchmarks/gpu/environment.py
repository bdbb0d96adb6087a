"""The environment of the stages' processes: import path, caches, and the compiled extension, built if missing."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.gpu.runner import ROOT, Process, Session

BUILD_SECONDS = 300.0


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(scratch: Path, packages: Path) -> dict[str, str]:
    """Variables of every process: this checkout's packages, new caches, no interpreter instead of the GPU."""
    before = os.environ.get("PYTHONPATH")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {
        # CMake and Ninja may be beside this Python alone.
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT), *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }


def has_extension(scratch: Path, packages: Path) -> bool:
    """Return whether the compiled extension is among ``packages`` and loads."""
    check = "from ecore_kernels import native; raise SystemExit(not native.available())"
    variables = environment(scratch, packages)
    found = subprocess.run([sys.executable, "-c", check], cwd=scratch, env=variables, capture_output=True)
    return found.returncode == 0


def build_extension(session: Session) -> None:
    """Build the extension beside a copy of the packages, and let later processes import those."""
    built, made = session.scratch / "packages", session.scratch / "build"
    # Straight by CMake: setup.py wants a newer setuptools than may be there.
    configure = ["cmake", "-S", str(ROOT), "-B", str(made), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={built / 'ecore_kernels'}"]
    nvcc = Path("/usr/local/cuda/bin/nvcc")
    if not shutil.which("nvcc") and nvcc.exists():
        configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    script = f"{shlex.join(configure)} && {shlex.join(['cmake', '--build', str(made)])}"
    session.run(Process("build the extension", ["sh", "-c", script], BUILD_SECONDS))
    shutil.copytree(ROOT / "kernels", built, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    # In front of a rehearsal's additions and whatever else the session has.
    session.environment = {
        **session.environment,
        "PYTHONPATH": os.pathsep.join([str(built), session.environment["PYTHONPATH"]]),
    }
