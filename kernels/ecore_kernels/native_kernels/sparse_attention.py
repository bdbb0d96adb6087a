"""Attention over a sparse graph on a CPU: csrc/sparse_attention_cpu.cpp, seen from torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecore_kernels.layout import rows_together
from ecore_kernels.native_kernels import CPU, address, kernel


def _nodes(tensor: Tensor | None) -> tuple[int, int, int]:
    """A tensor [N, H, d] as the extension takes it: address, strides over N and H; zeros for None."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    bias: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_offset: Tensor | None,
    sender: Tensor,
    receiver: Tensor,
    receiver_begin: Tensor,
    by_receiver: Tensor,
    sender_begin: Tensor,
    by_sender: Tensor,
    scale: float,
    results: Sequence[Tensor],
) -> None:
    """Run the forward kernel."""
    inputs = (query, key, value, edge, bias, key_scale, key_offset, value_offset)
    inputs = [rows_together(x) for x in inputs]  # type: ignore[assignment]
    output, weight = results
    graph = [x.contiguous() for x in (sender, receiver, receiver_begin, by_receiver, sender_begin, by_sender)]
    kernel("sparse_attention_forward", query.dtype)(
        (query.shape[0], key.shape[0], *query.shape[1:], value.shape[2]),
        [x.data_ptr() for x in graph],
        [_nodes(x) for x in inputs], scale, weight.data_ptr(), output.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edge: Tensor | None,
    bias: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_offset: Tensor | None,
    sender: Tensor,
    receiver: Tensor,
    receiver_begin: Tensor,
    by_receiver: Tensor,
    sender_begin: Tensor,
    by_sender: Tensor,
    weight: Tensor,
    scale: float,
    needs: list[bool],
    results: Sequence[Tensor | None],
) -> None:
    """Run the backward kernel: first by receiver, then by sender."""
    inputs = (query, key, value, edge, bias, key_scale, key_offset, value_offset)
    inputs = [rows_together(x) for x in inputs]  # type: ignore[assignment]
    grad_output = grad_output.contiguous()
    graph = [x.contiguous() for x in (sender, receiver, receiver_begin, by_receiver, sender_begin, by_sender)]
    # The gradient of scores is also that of the bias, and the senders' part reads it.
    grad_score = results[4] if results[4] is not None else torch.empty_like(weight, device=CPU)
    kernel("sparse_attention_backward", query.dtype)(
        (query.shape[0], key.shape[0], *query.shape[1:], value.shape[2]),
        [x.data_ptr() for x in graph],
        [_nodes(x) for x in inputs], scale, weight.data_ptr(), _nodes(grad_output), grad_score.data_ptr(),
        [address(x) for x in results], torch.get_num_threads(),
    )  # fmt: skip
