"""The parts of a transformer's step: projections and attention."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ecore.model import transformer
from ecore.model.transformer import FEWER_ROWS, attend, project
from ecore_kernels import QuantizedLinear


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 200])
@pytest.mark.parametrize("columns", [7, 64, 701])
@pytest.mark.parametrize("splits", [True, False])
def test_project_is_linear(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, threads: int, splits: bool
) -> None:
    """On every CPU as on those where products are split, and as on the others."""
    monkeypatch.setattr("ecore.model.transformer._splits_products", lambda: splits)
    monkeypatch.setattr("ecore.model.transformer._LARGE", 1000)  # the smallest stays under it
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, bias = (torch.randn(shape).double() for shape in ((rows, 24), (columns, 24), (columns,)))
        result = project(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(result, x @ weight.mT + bias)
    assert result.is_contiguous()


@pytest.mark.parametrize("rows", [1, FEWER_ROWS, FEWER_ROWS + 1])
def test_project_by_float32_weights_for_few_rows(rows: int) -> None:
    x, weight, bias = (torch.randn(shape) for shape in ((rows, 24), (701, 24), (701,)))
    result = project(x, QuantizedLinear(weight, None, bias), bias)
    torch.testing.assert_close(result, x @ weight.mT + bias)


@pytest.mark.parametrize(
    "vendor, mkl, splits",
    [("GenuineIntel", True, False), ("AuthenticAMD", True, True), ("GenuineIntel", False, True)],
)
def test_products_are_split_except_by_mkl_on_its_own_cpus(
    monkeypatch: pytest.MonkeyPatch, vendor: str, mkl: bool, splits: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id\t: {vendor}\n")
    assert transformer._splits_products.__wrapped__() is splits


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("masked", ["nothing", "per row", "for all rows"])
def test_attend_is_attention(batch: int, queries: int, masked: str) -> None:
    shape = (batch, 2, queries, 5)
    query, keys, values = (torch.randn(shape if i == 0 else (batch, 2, 6, 5)).double() for i in range(3))
    bias = None
    if masked != "nothing":
        bias = torch.zeros(batch if masked == "per row" else 1, 1, 1, 6).double()
        bias[..., 4:] = -math.inf
        bias[0, ..., 3:] = -math.inf
    scores = query @ keys.mT * 5**-0.5 + (0.0 if bias is None else bias)
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(query, keys, values, bias), expected)
