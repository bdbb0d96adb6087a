"""All benchmarks in one command: what is missing has a name and an exit code, and the others still run."""

import sys

import pytest

from benchmarks import __main__ as all_of_them
from benchmarks import harness, otsu, step_operators
from benchmarks.generation import __main__ as generation
from benchmarks.operators import __main__ as operators


def test_failures_have_names_and_the_others_run(monkeypatch, capsys):
    ran = []

    def ends(name, code):
        def main(argv):
            ran.append(name)
            raise SystemExit(code)

        return main

    def breaks(argv):
        ran.append("operators")
        raise FileNotFoundError("no such table")

    monkeypatch.setattr(otsu, "main", ends("otsu", 2))  # as where the extension was not built
    monkeypatch.setattr(operators, "main", breaks)
    monkeypatch.setattr(step_operators, "main", ends("step_operators", 0))
    monkeypatch.setitem(
        sys.modules, "benchmarks.training", None
    )  # as where a package of its imports is missing
    monkeypatch.setattr(generation, "main", ends("generation", 0))
    with pytest.raises(SystemExit) as stopped:
        all_of_them.main([])
    assert ran == ["otsu", "operators", "step_operators", "generation"]
    first, second, third = str(stopped.value.code).splitlines()
    assert first == "left out: otsu: it ended with 2"
    assert second == "left out: operators: FileNotFoundError: no such table"
    assert third.startswith("left out: training: ModuleNotFoundError")


def test_nothing_is_said_where_nothing_is_missing(monkeypatch):
    for name in all_of_them.QUESTIONS:
        module = sys.modules[harness.command(f"benchmarks.{name}").__module__]
        monkeypatch.setattr(module, "main", lambda argv: None)
    all_of_them.main([])
