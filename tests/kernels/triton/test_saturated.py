"""The 2x rule where softmaxes saturate, and what it rests on: one order of sums, and a score rounded by itself."""

from __future__ import annotations

import re

import pytest

from ecore_kernels import triton_kernels
from tests.kernels.saturated import CASES, LARGEST, ratios
from tests.kernels.triton.test_compile import python

pytest.importorskip("triton", reason="needs Triton")

from ecore_kernels.triton_kernels import launch


@pytest.mark.skipif(
    not triton_kernels.INTERPRETED or bool(triton_kernels.unavailable_reason()),
    reason="Triton's interpreter is not in use: TRITON_INTERPRET is not 1, or Triton is missing",
)
@pytest.mark.parametrize("largest", [1.0, 100.0, 8e3, 1e5])
@pytest.mark.parametrize("case", CASES)
def test_errors_are_within_twice_plain_pytorchs(case, largest):
    resolutions = 1 if CASES[case] else 2  # histories take long
    found = ratios(case, largest, "triton", words=16, emotions=6, resolutions=resolutions)
    assert {name: ratio for name, ratio in found.items() if not ratio <= 2} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("case", CASES)
def test_errors_on_a_gpu(case, largest):
    found = ratios(case, largest, "triton", words=96, emotions=32, device="cuda")
    assert {name: ratio for name, ratio in found.items() if not ratio <= 2} == {}


@pytest.mark.parametrize("arithmetic", ["ieee", "float64"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("head", [16, 64, 128, 256])
def test_heads_are_cut_alike_in_both_directions(arithmetic, head, depth):
    forward, backward = (
        launch.configuration(f"graph_attention_{direction}", arithmetic, head, depth, 86)[0]["PIECE"]
        for direction in ("forward", "backward")
    )
    assert min(forward, head) == min(backward, head)


PTX = """
import os, tempfile
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
import triton
from triton.backends.compiler import GPUTarget
from ecore_kernels import ahead_of_time
for kernel in ("graph_attention", "edge_attention"):
    for direction in ("forward", "backward"):
        entry = ahead_of_time.Entry(f"{kernel}_{direction}", "half", 100, 0, 86)
        launched = ahead_of_time.planned(entry)
        source = ahead_of_time.source_of(launched)
        made = triton.compile(source, target=GPUTarget("cuda", 86, 32), options=launched.options)
        print("=====", kernel, direction)
        print(made.asm["ptx"])
"""


@pytest.mark.slow
def test_scores_are_rounded_before_the_maximum_is_subtracted(tmp_path):
    """In the code for sm_86 what an exponential takes comes from a subtraction of products, not from an fma."""
    script = tmp_path / "ptx.py"
    script.write_text(PTX)
    result = python(script)
    assert result.returncode == 0, result.stderr
    programs = result.stdout.split("===== ")[1:]
    assert len(programs) == 4
    for program in programs:
        written = re.findall(r"^\s*(\w+)\.\S+\s+(%\w+), .*;$", program, re.M)
        made = {register: operation for operation, register in written}
        exponents = re.findall(r"ex2\.approx\S*\s+%\w+, (%\w+);", program)
        assert exponents
        assert {made[register] for register in exponents} == {"sub"}, program.splitlines()[0]
