"""Builds the compiled extension ``ecore_kernels._native`` with CMake and Ninja. The rest: pyproject.toml.

Environment:
    ECORE_NATIVE  ON (default) or OFF: install the Python packages alone, without a compiler.
    ECORE_CUDA    AUTO (default: CUDA kernels where nvcc works), ON (fail without them) or OFF.
    CMAKE_ARGS    further arguments for CMake, for instance -DECORE_WERROR=ON.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def fail(message: str) -> None:
    # Not a distutils error: some setuptools commands print a traceback around those.
    raise SystemExit(f"error: {message}")


def program(name: str) -> str:
    """Path of cmake or ninja: on PATH (the isolated build's own come first there) or beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    return found or fail(f"{name} was not found; ECORE_NATIVE=OFF installs without the compiled extension")


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = program("cmake"), program("ninja")
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # What CMake remembers is stale once a compiler came or went. Objects stay: Ninja knows the good ones.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        self.cmake(
            [
                *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
                f"-DECORE_CUDA={os.environ.get('ECORE_CUDA', 'AUTO')}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]
        )
        self.cmake([cmake, "--build", str(build)])

    def cmake(self, command: list[str]) -> None:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in result.stdout.splitlines():
            if line.startswith("ecore-error: "):
                fail(line.removeprefix("ecore-error: "))
        print(result.stdout, flush=True)
        if result.returncode:
            fail("CMake failed, see above; ECORE_NATIVE=OFF installs without the compiled extension")


native = os.environ.get("ECORE_NATIVE", "ON")
if native not in ("ON", "OFF"):
    fail(f"ECORE_NATIVE is ON or OFF, not {native!r}")
setup(
    ext_modules=[Extension("ecore_kernels._native", sources=[])] if native == "ON" else [],
    cmdclass={"build_ext": BuildWithCMake},
)
