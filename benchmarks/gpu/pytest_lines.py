"""A pytest plugin for runs that may be killed: what tells most runs first, and outcomes are written at once.

``python -m pytest -p benchmarks.gpu.pytest_lines --lines FILE`` writes a JSON object a line: ``test``, ``outcome``
("passed", "skipped", "failed"), ``seconds``, and why it failed. ``--first PATH``, perhaps several times, lets the tests
of a file or folder run before all others, those of the first PATH before those of the second.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LONGEST = 4000  # letters of a failure, its end


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, metavar="FILE", help="write every test's outcome to FILE at once")

    parser.addoption(
        "--first", action="append", default=[], metavar="PATH", help="run these tests first; repeat for more"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = [config.rootpath / path for path in config.getoption("first")]

    def rank(item: pytest.Item) -> int:
        return next((i for i, path in enumerate(first) if item.path.is_relative_to(path)), len(first))

    items.sort(key=rank)


def pytest_configure(config: pytest.Config) -> None:
    # Of several processes (xdist) the one that hears from all of them writes.
    if config.getoption("lines") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Lines(config.getoption("lines")))


class _Lines:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # What a test sets up and takes down counts where it does not pass.
        if report.when == "call" or not report.passed:
            self._write(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, 0.0)

    def _write(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 3)}
        if report.failed:
            line["why"] = report.longreprtext[-LONGEST:]
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
