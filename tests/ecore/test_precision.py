"""The precision of float32 products; and low precision's kernels: a CPU keeps few of them, however many shapes come."""

import os
import subprocess
import sys

import pytest
import torch

from ecore.precision import KEPT_KERNELS, autocast, float32_products, settle, trial
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
            older = torch.get_float32_matmul_precision()
        except RuntimeError:
            older = None
        backends = (torch.backends.cuda, torch.backends.mkldnn)
        matmuls = [getattr(backend, "matmul", None) for backend in backends]
        return older, [getattr(matmul, "fp32_precision", None) for matmul in matmuls]

    before = read()
    yield read
    torch.set_float32_matmul_precision("highest")
    for backend, value in zip((torch.backends.cuda, torch.backends.mkldnn), before[1], strict=True):
        if value is not None:
            backend.matmul.fp32_precision = value


@pytest.mark.parametrize("torch_setting", ["untouched", "highest", "high", "medium", "tf32", "ieee"])
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
    torchs_settings, torch_setting, device, precision, expected
):
    """By torch's older setting, or by its newer one, after which the older may refuse to be read."""
    if torch_setting in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(torch_setting)
    elif torch_setting != "untouched":
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            pytest.skip("needs torch 2.9")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = torch_setting
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


def timed(**seconds):
    """A trial with given results, which notes what it was asked."""

    def measure(device, precisions):
        measure.asked.append((device.type, tuple(precisions)))
        return {name: seconds[name] for name in precisions}

    measure.asked = []
    return measure


@pytest.mark.parametrize(
    ("device", "seconds", "best"),
    [
        ("cpu", {"float32": 0.2, "bfloat16": 0.46}, "float32"),
        ("cpu", {"float32": 0.2, "bfloat16": 0.1}, "bfloat16"),
        ("cuda", {"float32": 0.2, "tf32": 0.05, "bfloat16": 0.1}, "tf32"),
    ],
)
def test_auto_takes_the_fastest(device, seconds, best):
    measure = timed(**seconds)
    found, line = settle("auto", torch.device(device), measure)
    assert found == best
    assert line.startswith(f"--precision auto: {best} has the fastest products here")
    assert "\n" not in line
    assert len(measure.asked) == 1
    for name, taken in seconds.items():
        comparison = f"{name} takes {taken / seconds[best]:.1f} times as long"
        assert (comparison in line) == (name != best)


def test_a_precision_that_loses_is_said_so():
    found, line = settle("bfloat16", torch.device("cpu"), timed(float32=0.2, bfloat16=0.46))
    assert found == "bfloat16"  # it was asked for
    assert line == (
        "--precision bfloat16: products take 2.3 times as long as in float32 on this CPU, by a trial; "
        "--precision auto takes the fastest"
    )


def test_a_precision_that_wins_or_cannot_lose_is_not():
    assert settle("bfloat16", torch.device("cpu"), timed(float32=0.2, bfloat16=0.1)) == ("bfloat16", None)
    for precision, device in (("float32", "cpu"), ("tf32", "cpu"), ("bfloat16", "cuda"), ("float16", "cuda")):
        measure = timed()
        assert settle(precision, torch.device(device), measure) == (precision, None)
        assert not measure.asked


def test_the_trial(monkeypatch):
    """It measures every precision, and leaves torch's generator and settings as they were."""
    monkeypatch.setattr("ecore.precision.TRIAL_ROWS", 16)
    state, setting = torch.get_rng_state(), torch.get_float32_matmul_precision()
    seconds = trial(torch.device("cpu"), ("float32", "bfloat16", "float16"))
    assert seconds.keys() == {"float32", "bfloat16", "float16"}
    assert all(0 < taken < 60 for taken in seconds.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == setting
    assert not torch.is_autocast_enabled("cpu")
