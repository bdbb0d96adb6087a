"""The parts of a transformer's step: projections and attention."""

from __future__ import annotations

import math

import pytest
import torch

from ecore.model.transformer import attend, project


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 200])
@pytest.mark.parametrize("columns", [7, 64, 701])
def test_project_is_linear(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, threads: int) -> None:
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
