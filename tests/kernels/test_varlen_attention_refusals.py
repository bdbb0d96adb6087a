"""varlen_attention refuses each bad input in one line."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels import Sequences, explain, native, varlen_attention

needs_native = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
Q, KV, S = torch.randn(9, 2, 4), torch.randn(6, 2, 2, 4), Sequences.from_lengths([4, 5])
OF_KEYS = Sequences.from_lengths([2, 4])
WRONG = {
    "query: expected a tensor, got NoneType": {"query": None},
    "query: expected a float type, got torch.int64": {"query": Q.long()},
    "query: expected real numbers, got torch.complex64": {"query": Q.to(torch.complex64)},
    "query: expected a dense tensor, got torch.sparse_coo": {"query": Q.to_sparse()},
    "query: expected [R, H, d], got [9, 8]": {"query": Q.flatten(1)},
    "query: expected [R, 3, H, d] without a key, got [9, 2, 4]": {"key": None, "key_sequences": None},
    "query: expected [R, 3, H, d] without a key, got [9, 2, 2, 4]": {
        "query": torch.randn(9, 2, 2, 4), "key": None, "key_sequences": None
    },
    "query: expected heads of at least one element, got [9, 2, 0]": {"query": Q[:, :, :0]},
    "query: expected the 9 rows of its sequences, got [8, 2, 4]": {"query": Q[:8]},
    "key: expected a tensor, got list": {"key": [1.0]},
    "key: expected [6, 2, G, 4], got [6, 2, 4]": {"key": KV[:, 0]},
    "key: expected [6, 2, G, 4], got [5, 2, 2, 4]": {"key": KV[:5]},
    "key: expected [6, 2, G, 4], got [6, 2, 2, 3]": {"key": KV[..., :3]},
    "key: expected [6, G, 4], got [6, 2, 2, 4]": {"value": KV[:, 1]},
    "key: expected a divisor of the 2 heads of queries, got 3": {
        "key": KV[:, 0, :1].expand(-1, 3, -1),
        "value": KV[:, 1],
    },
    "key: expected a divisor of the 2 heads of queries, got 0": {"key": KV[:, 0, :0], "value": KV[:, 1, :0]},
    "value: expected [6, 1, dv], got [6, 2, 4]": {"key": KV[:, 0, :1], "value": KV[:, 1]},
    "value: expected None beside no key, got [6, 2, 4]": {"key": None, "value": KV[:, 1]},
    "value: expected [6, 2, dv], got [5, 2, 4]": {"key": KV[:, 0], "value": KV[:5, 1]},
    "value: expected [6, 2, dv], got [6, 1, 4]": {"key": KV[:, 0], "value": KV[:, 1, :1]},
    "value: expected [6, 2, dv], got [6, 8]": {"key": KV[:, 0], "value": KV[:, 1].flatten(1)},
    "value: expected a float type, got torch.bool": {"key": KV[:, 0], "value": KV[:, 1] > 0},
    "sequences: expected Sequences, got NoneType": {"sequences": None},
    "sequences: expected Sequences, got Tensor": {"sequences": S.offsets},
    "key_sequences: expected Sequences, got list": {"key_sequences": [2, 4]},
    "key_sequences: expected 2 sequences, got 3": {"key_sequences": Sequences.from_lengths([2, 4, 0])},
    "causal: expected key_sequences None: keys are in the order of their queries": {"causal": True},
    "scale: expected a number, got str": {"scale": "1"},
    "scale: expected a number, got Tensor": {"scale": torch.ones(())},
    "expected all tensors on one device, got cpu and meta": {"key": KV.to("meta")},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_one_line(message):
    right = {"query": Q, "key": KV, "value": None, "sequences": S, "key_sequences": OF_KEYS}
    with pytest.raises(ValueError) as raised:
        varlen_attention(**(right | WRONG[message]))
    assert str(raised.value) == f"varlen_attention: {message}"


def test_offsets_have_to_be_where_the_tensors_are():
    with pytest.raises(ValueError, match="expected all tensors on one device, got cpu and meta"):
        varlen_attention(Q, Q, Q, S.to("meta"))


@needs_native
def test_an_inference_tensor_is_named():
    with torch.inference_mode():
        key = torch.randn(9, 2, 4)
    with pytest.raises(ValueError, match="varlen_attention: key: an inference tensor cannot be saved"):
        varlen_attention(Q.clone().requires_grad_(), key, Q, S, backend="native")


FITTING = "expected ascending numbers from 0 to {}, the number of rows"
OFFSETS = {
    "too many rows": ([0, 4, 10], None, "offsets: " + FITTING.format(9)),
    "too few rows": ([0, 4, 8], None, "offsets: " + FITTING.format(9)),
    "not from 0": ([1, 4, 9], None, "offsets: " + FITTING.format(9)),
    "descending": ([0, 12, 9], None, "offsets: " + FITTING.format(9)),
    "negative": ([0, -4, 9], None, "offsets: " + FITTING.format(9)),
    "keys' too many": ([0, 4, 9], [0, 2, 10], "key_offsets: " + FITTING.format(9)),
    "keys' descending": ([0, 4, 9], [0, 10, 9], "key_offsets: " + FITTING.format(9)),
    "another number of sequences": ([0, 4, 9], [0, 9], r"key_offsets: expected int64 \[B \+ 1\], got"),
    "no numbers": ([], None, r"offsets: expected int64 \[B \+ 1\], got torch.int64 \[0\]"),
}


@needs_native
@pytest.mark.parametrize("offsets, key_offsets, message", OFFSETS.values(), ids=OFFSETS)
def test_offsets_that_do_not_fit(offsets, key_offsets, message):
    """The registered operators read by address, so they look at the numbers first; both directions."""
    inputs = (Q, Q, Q, torch.tensor(offsets, dtype=torch.int64))
    inputs += (None if key_offsets is None else torch.tensor(key_offsets),)
    ops, statistics = torch.ops.ecore_kernels, torch.zeros(2, 2, 9)
    with pytest.raises(ValueError, match=f"^varlen_attention: {message}"):
        ops.fused_varlen_attention(*inputs, False, 1.0, "native")
    with pytest.raises(ValueError, match=f"^varlen_attention: {message}"):
        ops.fused_varlen_attention_backward(
            Q, *inputs, Q, statistics, False, 1.0, [True, True, True], "native"
        )


@needs_native
def test_offsets_of_another_type():
    with pytest.raises(ValueError, match=r"offsets: expected int64 \[B \+ 1\], got torch.int32 \[3\]"):
        torch.ops.ecore_kernels.fused_varlen_attention(Q, Q, Q, S.offsets.int(), None, False, 1.0, "native")


def test_the_choice_of_a_backend():
    best = "native" if native.available() else "reference"
    lines = explain(varlen_attention, Q, KV, None, S, OF_KEYS).splitlines()
    assert lines[0] == f"varlen_attention: {best}"
    assert lines[1] == "  triton: has no varlen_attention kernel"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call: it has no varlen_att"):
        varlen_attention(Q, KV, None, S, OF_KEYS, backend="triton")
    with pytest.raises(ValueError, match="key_sequences: expected 2 sequences"):
        explain(varlen_attention, Q, Q, Q, S, Sequences.from_lengths([9]))
