"""Attention inside sequences on a CPU: csrc/varlen_attention_cpu.cpp, seen from torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels.layout import rows_together
from ecore_kernels.native_kernels import kernel


def _parts(
    query: Tensor | None, key: Tensor | None, value: Tensor | None, packed: int
) -> list[Tensor | None]:
    """Queries, keys and values of a call, or their gradients; ``packed`` of them lie side by side in the last one."""
    if packed == 3:
        return [None] * 3 if query is None else list(query.unbind(1))
    if packed == 2:
        return [query, *([None] * 2 if key is None else key.unbind(1))]
    return [query, key, value]


def _by_head(tensor: Tensor | None) -> tuple[int, int, int]:
    """A tensor [R, H, d] as the extension takes it: address, strides over R and H; zeros for None."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _check_offsets(offsets: Tensor, key_offsets: Tensor | None) -> None:
    """Raise ValueError unless both are int64 [B + 1]; the extension reads them by address, and checks their numbers."""
    for name, given in (("offsets", offsets), ("key_offsets", key_offsets)):
        if given is None:
            continue
        if given.dtype is not torch.int64 or given.dim() != 1 or not len(given) or len(given) != len(offsets):
            got = f"{given.dtype} {list(given.shape)}"
            raise ValueError(f"varlen_attention: {name}: expected int64 [B + 1], got {got}")


class _Call:
    """The arguments that the forward and the backward pass to the extension."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        offsets: Tensor,
        key_offsets: Tensor | None,
    ) -> None:
        _check_offsets(offsets, key_offsets)
        self.packed = 3 if key is None else 2 if value is None else 1
        self.inputs = [rows_together(x) for x in _parts(query, key, value, self.packed)]
        begins = [offsets.contiguous(), (offsets if key_offsets is None else key_offsets).contiguous()]
        of_query, of_key, of_value = self.inputs
        assert of_query is not None
        assert of_key is not None
        assert of_value is not None
        rows, heads, size = of_query.shape
        self.begins = begins  # memory that the extension reads
        self.sizes = (
            len(offsets) - 1, heads, of_key.shape[1], rows, of_key.shape[0], size, of_value.shape[2],
            *(x.data_ptr() for x in begins),
        )  # fmt: skip

    def by_head(self) -> list[tuple[int, int, int]]:
        return [_by_head(x) for x in self.inputs]


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    offsets: Tensor,
    key_offsets: Tensor | None,
    causal: bool,
    scale: float,
    results: Sequence[Tensor],
) -> None:
    """Run the forward kernel."""
    call = _Call(query, key, value, offsets, key_offsets)
    output, statistics = results
    kernel("varlen_attention_forward", query.dtype)(
        call.sizes,
        call.by_head(),
        scale,
        causal,
        statistics.data_ptr(),
        _by_head(output),
        torch.get_num_threads(),
    )


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    offsets: Tensor,
    key_offsets: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    causal: bool,
    scale: float,
    needs: Sequence[bool],
    results: Sequence[Tensor | None],
) -> None:
    """Run the backward kernel."""
    call = _Call(query, key, value, offsets, key_offsets)
    heard = [rows_together(x) for x in (output, grad_output)]
    to_query, to_key, to_value = results
    gradients = _parts(to_query, to_key, to_value, call.packed)
    kernel("varlen_attention_backward", query.dtype)(
        call.sizes, call.by_head(), scale, causal, statistics.data_ptr(), *(_by_head(x) for x in heard),
        [_by_head(x) for x in gradients], torch.get_num_threads(),
    )  # fmt: skip
