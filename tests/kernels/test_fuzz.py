"""The first cases of ``python -m tests.fuzz``, and that it finds what is wrong."""

from __future__ import annotations

import re

import pytest
import torch

from ecore_kernels import native, reference
from tests.fuzz import __main__ as fuzz
from tests.fuzz import cases, worker


@pytest.fixture(autouse=True)
def uninitialized_memory():
    """A worker changes a setting of its process; here that is the tests'."""
    yield
    torch.use_deterministic_algorithms(False)


def test_the_first_cases(capsys):
    code = fuzz.main(["--cases", "200"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for operator in cases.OPERATORS:
        (row,) = re.findall(rf"^\| +{operator} \|.*", printed, re.MULTILINE)
        *kernels, plain = (int(number) for number in re.findall(r"(\d+) right", row))
        assert plain >= 10
        assert sum(kernels) >= 10 or not native.available()


def test_a_case_depends_on_its_number_alone():
    for index in range(20):
        one, other = cases.draw(3, index), cases.draw(3, index)
        assert str(one) == str(other)
        for name, x in one.tensors.items():
            same = (
                torch.equal(x, other.tensors[name])
                if isinstance(x, torch.Tensor)
                else x == other.tensors[name]
            )
            assert same, name


def wrong_cases(count: int) -> list[str]:
    return [
        verdict
        for index in range(count)
        for verdict in worker.examine(0, index, ["reference"])
        if verdict not in ("right", "refused")
    ]


def test_a_lost_gradient_is_found(monkeypatch):
    attend = reference.attend
    monkeypatch.setattr(reference, "attend", lambda *given: attend(*given[:-1], given[-1].detach()))
    assert any(verdict.startswith("gradient of value") for verdict in wrong_cases(30))


def test_an_error_of_a_few_roundings_is_found(monkeypatch):
    attend = reference.attend

    def less_exact(*given):
        output = attend(*given)
        return output * (1 + 50 * torch.finfo(output.dtype).eps)

    monkeypatch.setattr(reference, "attend", less_exact)
    assert any(verdict.startswith("output 0") for verdict in wrong_cases(30))


def test_a_wrong_case_prints_the_command_that_runs_it_again(monkeypatch, capsys):
    monkeypatch.setattr(fuzz.Worker, "verdicts", lambda self, index: {"reference": "output 0: it is wrong"})
    assert fuzz.main(["--seed", "7", "--case", "12", "--backend", "reference"]) == 1
    printed = capsys.readouterr().out
    assert "python -m tests.fuzz --seed 7 --case 12 --backend reference  # output 0: it is wrong\n" in printed
    assert "1 WRONG" in printed


def test_a_process_that_dies_is_reported(capfd):
    """And the next case runs in a new one."""
    dying = fuzz.Worker(0, ["reference"], "")
    try:
        assert dying.verdicts(10**30)["reference"] in ("right", "refused")
        dying._process.kill()
        assert "exit code -9" in dying.verdicts(0)["reference"]
        assert dying.verdicts(0)["reference"] == "right"
    finally:
        dying.close()
