"""The way a launch takes on a GPU, as far as that goes without one: Triton binds the arguments and compiles for them.

Ahead-of-time compilation states the arguments' types itself; here Triton's own binder reads them off real tensors,
tuples, None and numbers.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Driver:  # what JITFunction asks of a driver before it loads what it has compiled
    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 86, 32)

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


driver.set_active(Driver())
from ecore_kernels.operators.registration import compute
from ecore_kernels.triton_kernels import launch

setting = "ieee", "triton"


def bind(kernel, grid, arguments, options, device):
    compiled = kernel.warmup(**arguments, grid=grid, **options)
    print(kernel.fn.__module__.split(".")[2] + kernel.fn.__name__, "ptx" in compiled.asm)


launch.launch = bind
launch.architecture = lambda device: 86
B, K, M, P, d = 2, 3, 20, 8, 12  # as the paper's 100, no multiple of 16, but compiled in a fraction of the time
N = M + P


def rows():
    return torch.randn(B, N, K, d, dtype=torch.bfloat16).transpose(1, 2)


query, key, value = rows(), rows(), rows()
for depth in (0, 1):
    past = [rows() for _ in range(depth)], [rows() for _ in range(depth)], torch.rand(B, K, N) if depth else None
    emotions = None if depth else torch.ones(B, P, dtype=torch.bool)
    mask, weight, correlation = torch.ones(B, K, M, dtype=torch.bool), torch.rand(B, P), torch.rand(P, P)
    needs = [True] * (3 + 2 * depth) + [depth > 0, True, True]
    past_and_scale = *past, 0.1, False
    forward = query, key, value, torch.rand(B, M), mask, weight, correlation, emotions
    output, saved = compute("graph_attention", "forward", (*forward, *past_and_scale, *setting))
    backward = output, query, key, value, mask, correlation, emotions, *past, output, saved, 0.1, False, needs
    compute("graph_attention", "backward", (*backward, *setting))
    readout = mask, weight, correlation, emotions, *past_and_scale
    compute("edge_readout", "forward", (*readout, *setting))
    compute("edge_readout", "backward", (weight, torch.rand(B, P, P), *readout, needs[3:], *setting))
edge, factor, sent, one = torch.rand(1, K, N, N), torch.rand(B, K, N), torch.rand(B, K, N), torch.rand(())
for more in ((None, factor, None, None, None), (edge, factor, sent, one, torch.ones((), dtype=torch.int64))):
    dense = query, key, value, edge, None, *more
    numbers = 0.1, None if more[0] is None else (-1.0, 1.0), 0.5, more[0] is not None
    output, new_edge, lse, saved = compute("edge_attention", "forward", (*dense, *numbers, True, *setting))
    needs = [x is not None for x in (*dense[:4], *dense[5:9])]
    backward = output, new_edge, lse, *dense, output, saved, *numbers, needs
    compute("edge_attention", "backward", (*backward, *setting))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_binds_what_the_launchers_pass(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # 40 % of the time, and of no program
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [
        "graph_attention",
        "edge_readout",
        "graph_attention",
        "edge_readout",
        "edge_attention",
        "edge_attention",
    ]
    bound = [f"{kernel}_{direction} True" for kernel in kernels for direction in ("forward", "backward")]
    assert sorted(done.stdout.splitlines()) == sorted(bound)
