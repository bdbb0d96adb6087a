"""The Otsu benchmark on a few rows: it refuses a wrong answer, and its table says what was measured."""

import sys

import pytest
import torch

import ecore_kernels
from benchmarks import harness, otsu
from ecore_kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())


def test_run(monkeypatch):
    monkeypatch.setattr(otsu, "ROWS", (4,))
    monkeypatch.setattr(otsu, "INPUT_ELEMENTS", 512)
    timed = harness.interleaved
    monkeypatch.setattr(
        harness,
        "interleaved",
        lambda calls, device: timed(calls, device=device, measurements=3, seconds_each=0.0),
    )
    (result,) = otsu.run("cpu", {})
    medians = {name: timing.median for name, timing in result["timings"].items()}
    assert result["reference_over_native"] == medians["reference"] / medians["native"]
    assert otsu.show(result)[0] == "4"


def test_a_wrong_answer_is_not_timed(monkeypatch):
    def wrong(values, most, backend):
        split = right(values, most, backend=backend)
        return split if backend == "reference" else split._replace(count=split.count + 1)

    right = ecore_kernels.otsu
    otsu.check(torch.randn(4, 32))
    monkeypatch.setattr(ecore_kernels, "otsu", wrong)
    with pytest.raises(SystemExit, match="count of 4 rows differs"):
        otsu.check(torch.randn(4, 32))


def test_what_a_missing_import_leaves_out_has_a_name_and_an_exit_code(monkeypatch, capsys):
    timing = harness.Timing(1.0, 1.0, 1.0, 1.0, 1, 1)
    monkeypatch.setattr(otsu, "ROWS", (4,))
    monkeypatch.setattr(otsu, "INPUT_ELEMENTS", 512)
    monkeypatch.setattr(harness, "interleaved", lambda calls, device: dict.fromkeys(calls, timing))
    monkeypatch.setitem(sys.modules, "skimage.filters", None)
    with pytest.raises(SystemExit, match=r"^left out: scikit-image: .*; pip install scikit-image$"):
        otsu.main([])
    assert "PyTorch / native" in capsys.readouterr().out  # what there is comes all the same
