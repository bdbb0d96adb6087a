"""The precision of float32 products; and low precision's kernels: a CPU keeps few of them, however many shapes come."""

import os
import subprocess
import sys

import pytest
import torch

from ecore.precision import KEPT_KERNELS, autocast, float32_products
from ecore_kernels.operators import registration

SHAPES = """
import sys, torch
from pathlib import Path
from ecore.precision import autocast

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


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_no_autocast_in_float32(precision):
    with autocast("cpu", precision):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("cpu", "float16", keep_casts=False):
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert not torch.is_autocast_cache_enabled()


@pytest.fixture
def torchs_settings():
    """Reads torch's settings of float32 products; puts its defaults back after the test."""

    def read():
        try:
            told = torch.get_float32_matmul_precision()
        except RuntimeError:
            told = None
        backends = (torch.backends.cuda, torch.backends.mkldnn)
        matmuls = [getattr(backend, "matmul", None) for backend in backends]
        return told, [getattr(matmul, "fp32_precision", None) for matmul in matmuls]

    before = read()
    yield read
    torch.set_float32_matmul_precision("highest")
    for backend, value in zip((torch.backends.cuda, torch.backends.mkldnn), before[1], strict=True):
        if value is not None:
            backend.matmul.fp32_precision = value


@pytest.mark.parametrize("told", ["untouched", "highest", "high", "medium", "tf32", "ieee"])
@pytest.mark.parametrize(
    "device, precision, expected",
    [
        ("cuda", "float32", "ieee"),
        ("cuda", "tf32", "tf32"),
        ("cuda", "bfloat16", "ieee"),
        ("cpu", "tf32", "ieee"),
        ("cpu", "float32", "ieee"),
    ],
)
def test_products_are_what_the_precision_says_whatever_torch_is_set_to(
    torchs_settings, told, device, precision, expected
):
    """By torch's older setting, or by its newer one, after which the older may refuse to be read."""
    if told in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(told)
    elif told != "untouched":
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            pytest.skip("needs torch 2.9")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = told
    before = torchs_settings()
    seen = []

    def products():
        with float32_products(device, precision):
            seen.append((torchs_settings()[0], torch.backends.cuda.matmul.allow_tf32))
            seen.append(registration._matmul_precision())  # the graph operators'
            raise KeyError

    with pytest.raises(KeyError):
        products()
    tensor_cores = expected == "tf32"
    assert seen == [("high" if tensor_cores else "highest", tensor_cores), expected]
    older, newer = torchs_settings()
    assert newer == before[1]
    assert before[0] in (older, None)
