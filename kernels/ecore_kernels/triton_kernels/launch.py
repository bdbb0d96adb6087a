"""Launch of a kernel: its configuration from the table, its arguments, and launches that are only planned.

Every launch goes through :func:`launch`, so that a kernel can be compiled without a GPU from exactly the arguments that
it would get on one: inside :func:`plan` the tensors are on the device ``meta``, and the launch is recorded instead of
made.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

TABLE = Path(__file__).with_name("launch_table.json")
FULL_VECTOR = 16  # the most bytes that one thread loads
COMPILER = {"enable_fp_fusion": False}
"""For every kernel. If the last product of a score were fused with the subtraction of a row's maximum, forward and
backward would round it differently; dots keep their fused multiply-adds."""


class Launch(NamedTuple):
    """One kernel launch: the kernel, its grid, its arguments, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


_planned: list[Launch] | None = None
_planned_architecture = 80


@contextlib.contextmanager
def plan(architecture: int) -> Iterator[list[Launch]]:
    """A context that gives a list: launches on ``meta`` tensors inside are appended to it, for that architecture.

    Args:
        architecture: compute capability times ten: 86 for sm_86.
    """
    global _planned, _planned_architecture
    before = _planned, _planned_architecture
    _planned, _planned_architecture = [], architecture
    try:
        yield _planned
    finally:
        _planned, _planned_architecture = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    options: Mapping[str, int],
    device: torch.device,
) -> None:
    """Launch a kernel on the tensors' device and its current stream; in :func:`plan`, record the launch."""
    options = {**options, **COMPILER}
    if device.type == "meta":
        if _planned is None:
            raise RuntimeError("a kernel on meta tensors can only be planned")
        _planned.append(Launch(kernel, grid, arguments, options))
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[grid](**arguments, **options)
    else:
        kernel[grid](**arguments, **options)


def taken(kernel: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of another kernel that this one takes too."""
    return {name: arguments[name] for name in kernel.arg_names}


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """Compute capability of a device, times ten; under the interpreter the oldest that is supported."""
    if device.type == "cuda":
        return _architecture(torch.cuda.current_device() if device.index is None else device.index)
    return _planned_architecture if device.type == "meta" else 80


@functools.cache
def table() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The launch table by kernel and type of arithmetic."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in json.loads(TABLE.read_text()):
        rows.setdefault((row["kernel"], row["arithmetic"]), []).append(row)
    return rows


@functools.cache
def configuration(
    kernel: str, arithmetic: str, head: int, depth: int, architecture: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """The table's entry for a call: constants of the kernel, options of the compiler.

    The entry has the smallest head size not below ``head`` (else the largest), then the greatest depth not above
    ``depth``, then the newest architecture not above ``architecture`` (else the oldest).

    Args:
        kernel: the kernel family and direction, such as "graph_attention_forward".
        arithmetic: "half", "tf32", "ieee" or "float64".
        head: head size, in elements.
        depth: layers of history.
        architecture: compute capability times ten.
    """
    rows = table()[kernel, arithmetic]

    def nearest(name: str, wanted: int, above: bool) -> None:
        nonlocal rows
        values = {row[name] for row in rows}
        fitting = [v for v in values if (v >= wanted if above else v <= wanted)]
        if fitting:
            chosen = min(fitting) if above else max(fitting)
        else:
            chosen = max(values) if above else min(values)
        rows = [row for row in rows if row[name] == chosen]

    nearest("head", head, above=True)
    nearest("depth", depth, above=False)
    nearest("architecture", architecture, above=False)
    (row,) = rows
    options = {"num_warps": row["num_warps"], "num_stages": row["num_stages"]}
    return dict(row["constants"]), options


def arithmetic_of(dtype: torch.dtype, precision: str) -> str:
    """The table's name for how a type is multiplied; ``precision`` ("ieee" or "tf32") counts for float32 alone."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "float64" if dtype is torch.float64 else precision


def dot_precision(arithmetic: str) -> str:
    """The ``input_precision`` of ``tl.dot``; types other than float32 ignore it."""
    return "tf32" if arithmetic == "tf32" else "ieee"


def bits(number: float) -> int:
    """The bits of a float64 as an integer: a kernel then gets all of them, and a new value does not recompile it."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def present(tensors: Sequence[Tensor | None]) -> int:
    """A bit for each tensor: set if it is not None."""
    return sum(1 << place for place, tensor in enumerate(tensors) if tensor is not None)


def padded(size: int) -> int:
    """A dimension of a dot's tile: a power of two, and 16 at least."""
    return max(16, triton.next_power_of_2(size))


def strides(**tensors: Tensor) -> dict[str, int]:
    """Kernel arguments: the strides of [B, K, N, d] tensors over batch, head and row, in units of VECTOR elements.

    The kernel multiplies them by the constant ``VECTOR`` again. So the compiler knows that it divides them, and loads
    full vectors even at sizes that are no multiple of 16, such as a head of 100.
    """
    size = min(tensor.element_size() for tensor in tensors.values())
    return _strides(tuple(tensors), tuple(tensor.stride() for tensor in tensors.values()), size)


@functools.lru_cache(maxsize=4096)
def _strides(
    names: tuple[str, ...], strides: tuple[tuple[int, ...], ...], element_size: int
) -> dict[str, int]:
    vector = math.gcd(FULL_VECTOR // element_size, *(stride for of in strides for stride in of[:3]))
    arguments = {"VECTOR": vector}
    for name, of in zip(names, strides, strict=True):
        for dimension, stride in zip(("batch", "head", "row"), of, strict=False):
            arguments[f"{name}_{dimension}"] = stride // vector
    return arguments
