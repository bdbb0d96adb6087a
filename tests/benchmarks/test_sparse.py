"""The sparse benchmark: every row's answers agree, and its file gives the table again."""

import pytest

from benchmarks import harness, sparse
from ecore_kernels import native


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sparse, "DEGREES", (3,))
    monkeypatch.setattr(sparse.torch, "compile", lambda function: function)  # minutes of C++ elsewhere
    sparse.main(["--nodes", "20", "--out", str(tmp_path / "sparse.json")])
    printed = capsys.readouterr().out
    assert "compiled / fused" in printed
    results = harness.read_timed_results(tmp_path / "sparse.json")
    assert [(r["edges"], r["vectors"]) for r in results] == [(60, False), (60, True)]
    assert sparse.report(results) in printed


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_a_wrong_answer_is_not_timed(monkeypatch):
    monkeypatch.setattr(sparse.torch, "compile", lambda function: function)
    monkeypatch.setattr(sparse, "fused", lambda *given: 2 * sparse.gather_scatter(*given))
    with pytest.raises(AssertionError):
        next(sparse.run(20, "cpu", {}))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nodes", "0"], "sparse: --nodes: expected at least 1, got 0\n"),
        (["--device", "cuda"], "sparse: there is no CUDA device\n"),
    ],
)
def test_refusals(monkeypatch, capsys, arguments, line):
    monkeypatch.setattr(sparse.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        sparse.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == line
