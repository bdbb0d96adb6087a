"""The interpreter of these tests, relieved of what it repeats, computes what Triton's own does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ecore_kernels import triton_kernels

pytestmark = pytest.mark.skipif(
    not triton_kernels.INTERPRETED or bool(triton_kernels.unavailable_reason()),
    reason="Triton's interpreter is not in use: TRITON_INTERPRET is not 1, or Triton is missing",
)

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
    own = tmp_path / "own.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN + "torch.save(results, sys.argv[1])", str(own)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    exec(RUN, found)
    expected = torch.load(own)
    assert len(found["results"]) == len(expected) == 6
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found["results"], expected, strict=True))


def test_what_was_replaced_is_there_again_after_a_launch():
    import triton.language as tl

    before = tl.load, tl.arange, tl.math.exp2
    found = {}
    exec(RUN, found)
    assert (tl.load, tl.arange, tl.math.exp2) == before
