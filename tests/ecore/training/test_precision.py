"""Low precision's kernels: a CPU keeps few of them, however many shapes come."""

import os
import subprocess
import sys

import pytest
import torch

from ecore.training.precision import KEPT_KERNELS, autocast

SHAPES = """
import sys, torch
from pathlib import Path
from ecore.training.precision import autocast

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
a, b = torch.randn(600, 64), torch.randn(64, 600)
for rows in range(260, 600):
    if rows == 340:
        begin = resident()
    with autocast("cpu", sys.argv[1]):
        a[:rows] @ b
print(resident() - begin)
"""


def grown(precision, **environment):
    """MiB that 260 shapes of products take in a new process."""
    caches = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    kept = {key: value for key, value in os.environ.items() if key not in caches}
    command = [sys.executable, "-c", SHAPES, precision]
    return float(subprocess.run(command, check=True, capture_output=True, env=kept | environment).stdout)


@pytest.mark.skipif(
    sys.platform != "linux"
    or not torch.backends.mkldnn.is_available()
    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="no oneDNN, or a CPU for which it has no bfloat16",
)
def test_kernels_of_shapes_that_went_by_are_dropped():
    many = str(16 * KEPT_KERNELS)
    unbounded = grown("bfloat16", ONEDNN_PRIMITIVE_CACHE_CAPACITY=many, LRU_CACHE_CAPACITY=many)
    assert grown("bfloat16") < unbounded / 3


def test_no_autocast_in_float32():
    with autocast("cpu", "float32"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("cpu", "float16", keep_casts=False):
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert not torch.is_autocast_cache_enabled()
