"""The extension's build: what it records about itself, and that each configuration builds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ecore_kernels import native

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def configure(build: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def reported_errors(result: subprocess.CompletedProcess) -> list[str]:
    """Return the lines that setup.py shows of a failed build."""
    assert result.returncode != 0
    lines = (result.stdout + result.stderr).splitlines()
    return [line.removeprefix("ecore-error: ") for line in lines if line.startswith("ecore-error: ")]


needs_build_tools = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists() or tool("cmake") is None or tool("ninja") is None,
    reason="needs the sources, cmake and ninja",
)


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_build_record():
    record = native.build_record()
    assert set(record) == {"compiler", "build_type", "commit", "cuda", "cuda_missing", "cuda_architectures"}
    assert record["compiler"]
    assert bool(record["cuda"]) != bool(record["cuda_missing"])
    assert bool(record["cuda"]) == bool(record["cuda_architectures"])


@needs_build_tools
def test_a_missing_compiler_is_said_in_one_line(tmp_path):
    (line,) = reported_errors(configure(tmp_path, CXX=str(tmp_path / "no-such-compiler")))
    assert "no working C++ compiler" in line
    assert "ECORE_NATIVE=OFF" in line


@needs_build_tools
@pytest.mark.skipif(tool("c++") is None, reason="needs a C++ compiler")
def test_cuda_is_left_out_unless_it_was_asked_for(tmp_path):
    broken = str(tmp_path / "no-such-nvcc")
    automatic = configure(tmp_path / "auto", "-DECORE_CUDA=AUTO", CUDACXX=broken)
    assert automatic.returncode == 0, automatic.stdout + automatic.stderr
    (line,) = reported_errors(configure(tmp_path / "on", "-DECORE_CUDA=ON", CUDACXX=broken))
    assert line == f"ECORE_CUDA=ON, but {broken} does not compile a trial program"
    (line,) = reported_errors(configure(tmp_path / "typo", "-DECORE_CUDA=YES"))
    assert "AUTO, ON or OFF" in line


@needs_build_tools
@pytest.mark.skipif(tool("nvcc") is None, reason="needs nvcc")
def test_nvcc_compiles_the_cuda_kernels_without_warnings(tmp_path):
    result = configure(tmp_path, "-DECORE_CUDA=ON", "-DECORE_WERROR=ON")
    assert result.returncode == 0, result.stdout + result.stderr
    # The two sources that CUDA makes a difference to; the others were compiled to install the package.
    objects = [f"CMakeFiles/_native.dir/csrc/{name}.o" for name in ("otsu_cuda.cu", "bindings/module.cpp")]
    command = [tool("cmake"), "--build", tmp_path, "--target", *objects]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
