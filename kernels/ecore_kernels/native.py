"""The compiled extension seen from Python: tensors in, addresses out.

``_native`` (sources in csrc/) knows nothing of torch: this module checks tensors, allocates outputs, and passes
addresses, strides, the number of threads and the CUDA stream.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_native: Any
try:
    _native = importlib.import_module("ecore_kernels._native")
except ImportError as error:
    _native = None
    if importlib.util.find_spec("ecore_kernels._native") is None:
        _missing = (
            "the compiled extension was not built: install without ECORE_NATIVE=OFF and with a C++ compiler"
        )
    else:
        _missing = f"the compiled extension does not load: {error}"


def available() -> bool:
    """Return True if the compiled extension is there."""
    return _native is not None


def unavailable_reason() -> str:
    """Return the reason why :func:`available` is false; empty if it is true."""
    return "" if available() else _missing


def build_record() -> dict[str, str]:
    """Return the record of how the extension was compiled.

    Returns:
        compiler, build_type, commit ("" where unknown), cuda (nvcc's version, or ""), cuda_missing (why there
        is no CUDA, or "") and cuda_architectures; an empty dict without the extension.
    """
    return _native.build_record() if available() else {}


def simd() -> tuple[str, list[str]]:
    """The instruction set whose CPU kernels run, and those that this machine can run, narrowest first.

    The widest is used, or the one that the environment variable ECORE_KERNELS_SIMD names.

    Raises:
        ValueError: the named one is unknown, or this machine cannot run it.
    """
    return _native.simd(), _native.simd_available()


if available():
    simd()  # a wrong ECORE_KERNELS_SIMD raises at once, not at the first call
