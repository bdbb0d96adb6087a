"""Memory layout of the fused kernels' inputs and results."""

from __future__ import annotations

import torch

from ecore_kernels.layout import dense_rows, empty_rows, laid_out_like


def test_rows_are_copied_only_where_they_must_be():
    whole = torch.randn(2, 9, 3, 4)  # [B, N, K, d]
    heads = whole.transpose(1, 2)
    assert dense_rows(heads) is heads
    sliced = torch.randn(2, 3, 9, 12)[..., :4]
    assert dense_rows(sliced) is sliced
    windows = torch.randn(1, 3, 8).unfold(1, 2, 1).mT[:, None]  # its rows are apart and share elements
    for tensor in (heads.mT.contiguous().mT, heads[:, :1].expand(2, 3, 9, 4), heads[..., ::2], windows):
        copied = dense_rows(tensor)
        assert copied is not tensor
        assert copied.is_contiguous()
        assert torch.equal(copied, tensor)


def test_rows_that_are_32_bits_apart_are_copied():
    far = torch.empty(1, device="meta").as_strided((1, 1, 3, 4), (2**32, 2**32, 2**30, 1))
    assert dense_rows(far).stride() == (12, 12, 4, 1)


def test_results_that_would_reach_beyond_32_bits_have_their_heads_apart():
    for rows, stride in ((2**26, 24), (2**27, 8)):
        model = torch.empty_strided((1, 3, rows, 8), (24 * rows, 8, 24, 1), device="meta")
        assert empty_rows(model, rows, 8, torch.float32).stride(2) == stride


def test_laid_out_like():
    model = torch.randn(2, 9, 3, 4).transpose(1, 2)
    same = torch.randn(2, 9, 3, 4).transpose(1, 2)
    assert laid_out_like(same, model) is same
    other = torch.randn(2, 3, 9, 4)
    moved = laid_out_like(other, model)
    assert moved.stride() == model.stride()
    assert torch.equal(moved, other)
    single = torch.randn(1, 3, 9, 4).transpose(1, 2).contiguous().transpose(1, 2)
    odd = single.as_strided(
        single.shape, (7, *single.stride()[1:])
    )  # nobody steps along a dimension of size 1
    assert laid_out_like(odd, single) is odd


def test_results_keep_heads_side_by_side_if_the_model_does():
    heads = torch.randn(2, 9, 3, 4).transpose(1, 2)
    result = empty_rows(heads, 7, 5, torch.float64)
    assert result.shape == (2, 3, 7, 5)
    assert result.dtype is torch.float64
    assert result.transpose(1, 2).is_contiguous()
    assert empty_rows(heads.contiguous(), 7, 5, torch.float64).is_contiguous()
