"""Otsu's split in the extension: csrc/otsu_cpu.cpp and csrc/otsu_cuda.cu, seen from torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ecore_kernels import native
from ecore_kernels.tracing import constant_result


@constant_result  # torch.compile cannot trace into the extension
def _cuda_refusal(device: int) -> str:
    """Return the reason against the extension's CUDA kernels on that device, or ""."""
    return _asked_cuda_refusal(device)


@functools.cache
def _asked_cuda_refusal(device: int) -> str:
    missing = native.build_record()["cuda_missing"]
    if missing:
        return f"the compiled extension was built without CUDA: {missing}"
    return native._native.otsu_cuda_refusal(device)


def why_not(values: Tensor) -> str | None:
    """Return the reason against :func:`otsu` on values [B, P]; None if it can run."""
    if not native.available():
        return native.unavailable_reason()
    if values.dtype not in (torch.float32, torch.float64):
        return f"takes float32 and float64, not {str(values.dtype).removeprefix('torch.')}"
    if values.is_cpu:
        return None
    if not values.is_cuda:
        return f"runs on CPU and CUDA, not on {values.device.type}"
    refusal = _cuda_refusal(values.get_device())
    if refusal:
        return refusal
    if values.shape[1] > native._native.OTSU_CUDA_MAX_COLUMNS:
        return f"takes at most {native._native.OTSU_CUDA_MAX_COLUMNS} columns on CUDA, not {values.shape[1]}"
    return None


def otsu(values: Tensor, max_relevant: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Otsu's split of every row, as :func:`ecore_kernels.otsu` defines it.

    Args:
        values: [B, P] float32 or float64, P >= 1, on CPU or CUDA; any strides.
        max_relevant: the largest split tried, >= 1; None tries all.

    Returns:
        mask [B, P] bool, count [B] int64, threshold [B] in the type of values. On CUDA they are queued on the
        current stream, and a row that is not finite gets an empty mask, count 0 and threshold NaN.

    Raises:
        ValueError: on a CPU, if a row is not finite.
        RuntimeError: :func:`why_not` has a reason, or CUDA refuses the launch.
    """
    refusal = why_not(values)
    if refusal:
        raise RuntimeError(f"otsu: native: {refusal}")
    if values.stride(1) != 1:
        values = values.contiguous()
    rows, columns = values.shape
    mask = values.new_empty((rows, columns), dtype=torch.bool)
    count = values.new_empty(rows, dtype=torch.int64)
    threshold = values.new_empty(rows)
    pointers = mask.data_ptr(), count.data_ptr(), threshold.data_ptr()
    row_stride, most = values.stride(0), max_relevant or 0  # 0 tries every split
    if values.is_cuda:
        split = (
            native._native.otsu_cuda_float32
            if values.dtype is torch.float32
            else native._native.otsu_cuda_float64
        )
        device = values.get_device()
        stream = torch.cuda.current_stream(device).cuda_stream
        split(values.data_ptr(), rows, columns, row_stride, most, *pointers, device, stream)
    else:
        split = (
            native._native.otsu_cpu_float32
            if values.dtype is torch.float32
            else native._native.otsu_cpu_float64
        )
        bad = split(values.data_ptr(), rows, columns, row_stride, most, *pointers, torch.get_num_threads())
        if bad >= 0:
            raise ValueError(f"otsu: values: row {bad} is not finite")
    return mask, count, threshold
