"""The benchmark of published layers' forms: every fused answer is the formula's, and its file gives the table again."""

import pytest

from benchmarks import edge_options, harness
from ecore_kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    monkeypatch.setattr(
        edge_options.torch, "compile", lambda function, **_: function
    )  # minutes of C++ elsewhere


def test_rows(tmp_path, capsys):
    edge_options.main(["--nodes", "12", "20", "--out", str(tmp_path / "options.json")])
    printed = capsys.readouterr().out
    assert "compiled / fused" in printed
    results = harness.read_timed_results(tmp_path / "options.json")
    forms = [form.name for form in edge_options.FORMS]
    assert [(r["nodes"], r["form"]) for r in results] == [(n, form) for n in (12, 20) for form in forms]
    assert edge_options.report(results) in printed
    for result in results:
        # SDPA multiplies by no edge and returns no scores; FlexAttention has no backward here.
        assert ("sdpa" in result["timings"]) == result["form"].startswith("bias")
        assert "flex" not in result["timings"]


@pytest.mark.parametrize("form", edge_options.FORMS, ids=lambda form: form.name)
def test_rivals_do_the_same_work(form):
    """Without dropout, for which each draws its own mask."""
    form = edge_options.dataclasses.replace(form, dropout=0.0)
    leaves, sent = edge_options.problem(form, 12, "cpu")
    for attend in form.rivals("cpu").values():
        for got, expected in zip(
            edge_options.both_ways(attend, leaves, sent),
            edge_options.both_ways(form.fused, leaves, sent),
            strict=True,
        ):
            edge_options.torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", edge_options.FORMS, ids=lambda form: form.name)
def test_a_wrong_answer_is_not_timed(monkeypatch, form):
    right = edge_options.Form.fused

    def wrong(self, query, key, value, edge):
        return right(self, query, key, value, 1.01 * edge)

    monkeypatch.setattr(edge_options, "FORMS", (form,))
    monkeypatch.setattr(edge_options.Form, "fused", wrong)
    with pytest.raises(AssertionError):
        next(edge_options.run([20], "cpu", {}))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nodes", "64", "0"], "edge_options: --nodes: expected at least 1, got 0\n"),
        (["--device", "cuda"], "edge_options: there is no CUDA device\n"),
    ],
)
def test_refusals(monkeypatch, capsys, arguments, line):
    monkeypatch.setattr(edge_options.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        edge_options.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == line
