"""The interpreter of these tests, relieved of what it repeats, computes what Triton's own does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ecore_kernels import triton_kernels

pytestmark = pytest.mark.skipif(
    not triton_kernels.INTERPRETED or bool(triton_kernels.unavailable_reason()),
    reason="Triton's interpreter is not in use: TRITON_INTERPRET is not 1, or Triton is missing",
)

ROOT = Path(__file__).parents[3]
RUN = """
import sys
import torch
from ecore_kernels import EdgeUpdate, EmotionGraph, edge_attention, graph_attention, use_backend

torch.manual_seed(0)
correlation = torch.rand(2, 2, requires_grad=True)
graph = EmotionGraph(torch.rand(1, 3), torch.rand(1, 1, 3) > 0.2, torch.rand(1, 2), correlation)
query, key, value = (torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3))
with use_backend("triton"):
    output = graph_attention(query, key, value, graph, [EdgeUpdate(key, value)], scale=0.5)
    dense, _ = edge_attention(query, key, value, *graph.dense(), scale=0.5)
    gradients = torch.autograd.grad(output.sum() + dense.square().sum(), (query, key, value, correlation))
results = [output.detach(), dense.detach(), *gradients]
"""


def test_not_a_bit_changes(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    results = []
    for number, before in enumerate(("", "from tests.kernels.interpreter import quicken\nquicken()\n")):
        file = tmp_path / f"{number}.pt"
        command = [sys.executable, "-c", before + RUN + "torch.save(results, sys.argv[1])", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(file))
    assert len(results[0]) == len(results[1]) == 6
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_what_was_replaced_is_there_again_after_a_launch():
    import triton.language as tl

    before = tl.load, tl.arange, tl.math.exp2
    found = {}
    exec(RUN, found)
    assert (tl.load, tl.arange, tl.math.exp2) == before
