"""Summaries and tables of what processes wrote."""

import json
import os
import signal
import sys

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.runner import Process

TESTS = """
import pytest

@pytest.fixture
def broken():
    raise KeyError("no such thing")

def test_good(): pass
def test_bad(): assert 1 + 1 == 3, "wrong sum"
def test_broken(broken): pass
@pytest.mark.skip
def test_skipped(): pass
def test_killed():
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


def pytest_command(lines, folder, *more):
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.pytest_lines", "--lines", str(lines)]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    return [*command, "-c", os.devnull, *more, str(folder)]


def test_killed_tests_leave_what_they_knew(session, tmp_path):
    """And one file that cannot be imported keeps no other from running."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text("import no_such_module")
    (folder / "test_b.py").write_text(TESTS)
    lines = session.sources["tests"] = tmp_path / "tests.jsonl"
    session.run(Process("tests", pytest_command(lines, folder), 60.0))
    assert [record["outcome"] for record in session.records] == [f"exit code {-signal.SIGKILL}"]
    results = report.test_results(report.read(lines))
    assert (results["passed"], results["skipped"]) == (1, 1)
    failed = {name.rpartition("::")[2]: why for name, why in results["failed"].items()}
    assert sorted(failed) == ["test_a.py", "test_bad", "test_broken"]
    assert "no_such_module" in failed["test_a.py"]
    text = (session.folder / "summary.md").read_text()
    assert "1 passed, 1 skipped, 3 failed" in text
    assert "test_b.py::test_broken: " in text
    assert "wrong sum" in (session.folder / "results.json").read_text()
    with lines.open("a") as file:
        file.write('{"test": "torn')
    assert report.test_results(report.read(lines)) == results
    assert report.test_results(report.read(tmp_path / "none.jsonl")) is None


def test_the_most_informative_runs_first(session, tmp_path):
    folder = tmp_path / "tests"
    for name in ("test_a.py", "deep/test_b.py", "deep/test_c.py"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("def test_one(): pass\ndef test_two(): pass")
    lines = tmp_path / "tests.jsonl"
    first = ["--first", "deep/test_c.py", "--first", "deep"]
    session.run(Process("tests", pytest_command(lines, folder, *first), 60.0))
    assert not session.failures
    ran = [line["test"].rpartition("/")[2] for line in report.read(lines)]
    assert ran == [f"test_{file}.py::test_{name}" for file in "cba" for name in ("one", "two")]


def test_a_failure_has_its_last_words(session, python):
    session.run(python("importing", "import no_such_module"))
    text = (session.folder / "summary.md").read_text()
    assert "ModuleNotFoundError: No module named 'no_such_module'" in text.splitlines()[2]
    assert "Failed or left out: importing" in text


@pytest.fixture
def summary_with(session):
    """The summary with a result file."""

    def write(name, document):
        session.result(name).write_text(json.dumps(document))
        session.write()
        return (session.folder / "summary.md").read_text()

    return write


def test_tables(summary_with):
    timing = {"minimum": 0.01, "median": 0.012, "p20": 0.011, "p80": 0.013, "measurements": 7, "calls": 1}
    row = {
        "configuration": "all, CUDA graphs",
        "timing": timing,
        "mean_seconds": 0.0125,
        "speedup_median": 5.0,
    }
    document = {"preset": "paper", "device": "cuda", "data": "made up", "growth": []}
    document |= {"configurations": [row | {"peak_memory_mib": 900.0, "warm_up_seconds": 4.0}]}
    document["parts"] = {"plain": {"optimiser": 0.1}, "all": {"optimiser": 0.2}}
    (line,) = [line for line in summary_with("steps", {"results": [document]}).splitlines() if "CUDA" in line]
    assert [cell.strip() for cell in line.split("|")[1:4]] == ["all, CUDA graphs", "12.5 ms", "12 ms"]

    compared = {"precision": "tf32", "compared": "recorded / single", "steps": 48, "passed": False}
    text = summary_with("losses", {"results": [{**compared, "failed": "recorded: out of memory"}]})
    assert "recorded: out of memory" in text

    otsu = {"rows": 16, "timings": {"native": timing, "reference": timing}, "reference_over_native": 1.0}
    assert "12 ms (11 ms – 13 ms)" in summary_with("otsu", {"results": [otsu]})


def test_trainings_are_in_the_summary(session):
    run = session.scratch / "metrics.jsonl"
    lines = [{"step": 25, "loss": 5.0, "valid_ppl_per_sample": 60.0}, {"step": 50, "loss": 4.0}]
    run.write_text("".join(json.dumps(line) + "\n" for line in lines))
    session.sources["train soft"] = run
    session.write()
    assert "step 50, loss 4, best valid_ppl_per_sample 60" in (session.folder / "summary.md").read_text()


def test_a_table_that_fails_loses_nothing(summary_with, session):
    session.leave_out("there is none")
    text = summary_with("steps", {"results": [{}]})
    assert "- stage: stage: left out: there is none" in text
    assert "steps: KeyError: 'preset'" in text


def test_results_have_a_limit(session, monkeypatch):
    monkeypatch.setattr(report, "LARGEST_RESULTS", 1000)
    session.result("large").write_text(json.dumps(["x" * 900]))
    session.result("small").write_text(json.dumps(["y" * 300]))
    session.result("torn").write_text("[1, 2")
    found = report.collected(session.sources)
    assert found["large"] == "left out: 907 bytes"
    assert found["small"] == ["y" * 300]
    assert found["torn"].startswith("InputError")
