"""What is installed and compiled, what runs and why something is missing: ``python -m ecore_kernels.info``."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from ecore_kernels import backends, native


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none visible" if torch.version.cuda else "none: this torch is a CPU build"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} (sm_{properties.major}{properties.minor})")
    return ", ".join(names)


def report() -> str:
    """The whole installation in a few lines, for reading and for bug reports."""
    lines = [
        f"ecore {_version('ecore')}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), triton {_version('triton')}, "
        f"{torch.get_num_threads()} threads",
        f"GPUs: {_devices()}",
        f"backends here: {', '.join(backends.available_backends())}",
    ]
    if native.available():
        lines.append("native extension:")
        lines += [f"  {name}: {value}" for name, value in native.build_record().items()]
    else:
        lines.append(f"native extension: missing: {native.unavailable_reason()}")
    lines += [backends.explain(operator) for operator in backends.OPERATORS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
