"""Settings of every test: one thread, reproducible examples, and GPU tests only where there is a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # then the tests that need it fail, and those alone
    settings = None

# Without a GPU, Triton's interpreter runs the kernels; it has to be asked for before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests are small: more threads only fight over the cores that other workers of a parallel run use.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the processes that tests start
if settings is not None:
    settings.register_profile("ecore", deadline=None, derandomize=True, max_examples=15)
    settings.load_profile("ecore")


# By processor time and waiting, the longest first: one that begins last would leave the other cores idle.
LONG = (
    "ecore/training/test_cuda_graphs.py",
    "ecore/training/test_two_hosts.py",
    "ecore/training/test_distributed.py",
    "kernels/test_edge_options.py",
    "kernels/triton/test_saturated.py",
    "kernels/test_operators.py",
    "kernels/test_transforms.py",
    "kernels/test_surroundings.py",
    "kernels/test_native_simd.py",
    "kernels/test_typed.py",
    "ecore/paper/experiments/test_reproduce.py",
    "kernels/triton/test_compile.py",
    "ecore/model/test_training.py",
    "ecore/test_packages.py",
    "ecore/training/test_kill.py",
    "ecore/paper/figures/test_figures.py",
    "benchmarks/gpu/test_runner.py",
    "campaigns/test_campaigns.py",
    "kernels/triton/test_binding.py",
    "examples/test_examples.py",
    "kernels/test_export.py",
    "kernels/test_fuzz.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist hand out the files in the order of :func:`pytest_collection_modifyitems`."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; skip what is marked ``gpu`` on a machine without a CUDA device."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONG) + (item.path not in slow)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Exclude the objects that imports and collection made from garbage collection.

    They stay to the end; a full collection that visits them takes 0.4 s, and some tests call for many.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def settings_of_process() -> dict[str, object]:
    """Return settings of the whole process that a caller of the package may have made, and must find unchanged."""
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "torch.compile": torch._dynamo.config.get_hash(),
    }


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    """Fail the test that leaves a setting of the process changed; a later one would fail for it."""
    before = settings_of_process()
    yield
    assert settings_of_process() == before


@pytest.fixture
def fresh_compile() -> None:
    """torch.compile without what earlier tests left: its limit on recompilations counts a function's all."""
    torch._dynamo.reset()
