"""The benchmark of the step's operators on a few rows: it refuses a wrong answer, and its table has all candidates."""

import pytest

from benchmarks import harness, step_operators
from ecore_kernels.backends import Backend


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(step_operators, "VOCABULARY", 50)
    monkeypatch.setattr(step_operators, "WORDS", (7,))
    monkeypatch.setattr(step_operators, "ROWS", (9,))


def test_a_table(monkeypatch, capsys):
    timed = harness.interleaved
    monkeypatch.setattr(
        harness,
        "interleaved",
        lambda calls, device: timed(calls, device=device, measurements=3, seconds_each=0.0),
    )
    step_operators.main([])
    out = capsys.readouterr().out
    assert "linear_cross_entropy" in out
    assert "dropout_add_layer_norm" in out
    assert "varlen_attention" in out
    assert out.count("reference") == 3


def test_a_wrong_answer_is_not_timed(monkeypatch):
    right = step_operators.dropout_add_layer_norm
    monkeypatch.setattr(
        step_operators,
        "dropout_add_layer_norm",
        lambda *x, **options: tuple(1.001 * y for y in right(*x, **options)),
    )
    step_operators.check(step_operators.loss_case(7, "cpu"), "reference")
    step_operators.check(step_operators.attention_case(70, "cpu"), "reference")
    with pytest.raises(SystemExit, match="dropout_add_layer_norm of 9 rows on reference differs"):
        step_operators.check(step_operators.norm_case(9, "cpu"), "reference")


def test_wrong_attention_is_not_timed(monkeypatch):
    right = step_operators.varlen_attention
    monkeypatch.setattr(
        step_operators, "varlen_attention", lambda *x, **options: right(*x, **(options | {"causal": False}))
    )
    with pytest.raises(SystemExit, match="varlen_attention of 70 rows on reference differs"):
        step_operators.check(step_operators.attention_case(70, "cpu"), "reference")


def test_what_has_no_kernel_on_a_device_is_left_out(monkeypatch):
    """As varlen_attention on a GPU."""
    monkeypatch.setitem(step_operators.BACKENDS, "native", Backend("native", {}))
    monkeypatch.setattr(step_operators, "available_backends", lambda: ("native",))
    assert list(step_operators.run("cpu", False, {})) == []
