"""Types that hold for a user: five lines against the installed wheel under ``mypy --strict``."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ecore", "kernels")

USER = """
import torch
from ecore import ECore
from ecore_kernels import EdgeUpdate, EmotionGraph, edge_attention, edge_readout, graph_attention, otsu, use_backend

graph = EmotionGraph.from_intensity(torch.rand(1, 4), torch.tensor([4]), [0.0], torch.eye(2))
nodes = torch.randn(1, 1, 6, 8)
with use_backend("reference"):
    attended = graph_attention(nodes, nodes, nodes, graph, [EdgeUpdate(nodes, nodes)], scale=0.5)
output, new_edge = edge_attention(nodes, nodes, nodes, *graph.dense())
to_words, to_emotions = edge_readout(graph, [EdgeUpdate(nodes, nodes)])
"""
REVEALED = {
    "attended": "torch._tensor.Tensor",
    "output": "torch._tensor.Tensor",
    "new_edge": "torch._tensor.Tensor | None",
    "to_emotions": "torch._tensor.Tensor",
    "otsu(to_words).mask": "torch._tensor.Tensor",
    "graph.word_weight": "torch._tensor.Tensor",
    'ECore.from_pretrained("run")': "ecore.pipeline.ECore",
}
WRONG = """
from ecore_kernels import EmotionGraph, otsu

otsu([0.1, 0.2])
EmotionGraph.from_intensity(intensities=None)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter with the wheel, built without the extension, and this one's other packages."""
    folder = tmp_path_factory.mktemp("typed")
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    venv.create(environment, with_pip=False, symlinks=True)
    variables = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", vars=variables))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*install, "--target", str(site), str(source)],
        env={**os.environ, "ECORE_NATIVE": "OFF"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return environment / "bin" / "python"


@pytest.fixture(scope="module")
def lines(python, tmp_path_factory):
    """By file, the lines that ``mypy --strict`` prints of a user's good and wrong lines."""
    folder = tmp_path_factory.mktemp("user")
    reveal = "".join(f"reveal_type({expression})\n" for expression in REVEALED)
    files = {"user.py": USER + reveal, "wrong.py": WRONG}
    for name, text in files.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), *files]
    (folder / "mypy.ini").write_text("[mypy]\n")
    command += ["--no-error-summary", "--hide-error-context", "--config-file", "mypy.ini"]
    environment = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.stderr == ""
    printed = result.stdout.splitlines()
    return {name: [line for line in printed if line.startswith(f"{name}:")] for name in files}


def test_a_typed_users_lines_pass(lines):
    types = [line.partition('Revealed type is "')[2].rstrip('"') for line in lines["user.py"]]
    assert types == list(REVEALED.values()), "\n".join(lines["user.py"])


def test_wrong_lines_are_found(lines):
    """So that the first test does not pass on names whose types are unknown."""
    found = [line.split(":")[1] for line in lines["wrong.py"] if ": error: " in line]
    assert found == ["4", "5"], "\n".join(lines["wrong.py"])
