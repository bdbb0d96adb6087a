"""The one command for a GPU, with steps that stand in for its own: failing, hanging and flooding ones."""

import json
import os
import sys
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Report, Step


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "out", os.environ, {"gpu": "a GPU"}, total=60.0)


def python(name, code, seconds=20.0, **options):
    return Step(name, [sys.executable, "-c", code], seconds, **options)


def test_failing_and_hanging_steps_are_survived(report, tmp_path):
    alive = tmp_path / "alive"
    # Deaf to a polite request, and the parent of a process that would go on without it.
    hang = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("on it", flush=True)
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(4.5); open({str(alive)!r}, 'w')"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(60)
"""
    start = time.monotonic()
    report.run(
        python("good", "print('fine')"),
        python("bad", "print('before'); raise SystemExit(3)"),
        python("hanging", hang, seconds=2.0),
        Step("missing", ["/no/such/program"], 5.0),
        python("optional", "raise SystemExit(1)", required=False),
    )
    assert time.monotonic() - start < 9
    outcomes = {record["step"]: record["outcome"] for record in report.records}
    assert outcomes["good"] == "ok"
    assert outcomes["bad"] == "exit code 3"
    assert outcomes["hanging"] == "stopped: its time was over"
    assert outcomes["missing"].startswith("did not start")
    assert outcomes["optional"] == "exit code 1"
    assert report.failed()
    report.run(python("next", "print('it goes on')"))

    summary = json.loads((report.folder / "summary.json").read_text())
    assert [record["step"] for record in summary["steps"]][-1] == "next"
    text = (report.folder / "summary.md").read_text()
    assert "- hanging: stopped: its time was over" in text
    assert "## bad: the end of its output\n\n```\nbefore" in text
    assert "## optional" not in text
    log = (report.folder / "log.txt").read_text()
    assert all(words in log for words in ("fine", "on it", "it goes on"))
    time.sleep(max(0.0, start + 7 - time.monotonic()))
    assert not alive.exists()


def test_results_so_far_are_written_while_others_run(report):
    look = f"""
import json, pathlib, time
path = pathlib.Path({str(report.folder / "summary.json")!r})
while not path.exists(): time.sleep(0.05)
assert [s["step"] for s in json.loads(path.read_text())["steps"]] == ["quick"]
"""
    report.run(python("looking", look, seconds=15.0), python("quick", "pass"))
    assert [(r["step"], r["outcome"]) for r in report.records] == [("quick", "ok"), ("looking", "ok")]
    assert not report.failed()


def test_the_end_of_all_time_stops_every_step(tmp_path):
    report = Report(tmp_path, os.environ, {}, total=gpu.RESERVE_SECONDS + 1.0)
    start = time.monotonic()
    report.run(python("long", "import time; time.sleep(50)", seconds=100.0))
    report.run(python("late", "import time; time.sleep(50)", seconds=100.0))
    assert time.monotonic() - start < 8
    assert [record["outcome"] for record in report.records] == ["stopped: its time was over"] * 2


def test_files_stay_few_and_small(report):
    report.folder.mkdir()
    (report.folder / "tests.xml").write_bytes(b" " * (gpu.LARGEST_FILE + 1))
    report.run(python("flood", "print('x' * 3_000_000); print('the end')"))
    assert (report.folder / "log.txt").stat().st_size < 1.1 * gpu.LOG_BYTES
    assert "the end" in (report.folder / "log.txt").read_text()
    files = list(report.folder.rglob("*"))
    assert {file.name for file in files} == {"summary.json", "summary.md", "log.txt", "tests.xml"}
    assert all(file.stat().st_size < gpu.LARGEST_FILE for file in files)


def test_tests_are_counted(report):
    report.folder.mkdir()
    (report.folder / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure>no</failure></testcase>'
        '<testcase classname="b" name="three"><skipped/></testcase>'
        '<testcase classname="b" name="four"><error>no</error></testcase></testsuite></testsuites>'
    )
    assert gpu.test_results(report.folder / "tests.xml") == {
        "passed": 1,
        "skipped": 1,
        "failed": ["a::two", "b::four"],
    }
    report.note("something", "there is none")
    text = (report.folder / "summary.md").read_text()
    assert "1 passed, 1 skipped, 2 failed\n- a::two\n- b::four" in text
    assert "- something: left out: there is none" in text
    (report.folder / "tests.xml").write_text("<torn")
    assert gpu.test_results(report.folder / "tests.xml") is None


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "gpu: there is no CUDA device\n"
    assert not (tmp_path / "out").exists()


def test_where_results_go(monkeypatch):
    monkeypatch.setenv("OUT", "/somewhere")
    assert str(gpu.default_folder("NVIDIA H200")) == "/somewhere"
    monkeypatch.delenv("OUT")
    assert gpu.default_folder("NVIDIA H200") == gpu.ROOT / "benchmarks" / "results" / "nvidia-h200"


def test_steps_import_this_checkout(monkeypatch, tmp_path):
    """And are not told to interpret kernels that are to run on a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    variables = gpu.environment(tmp_path, gpu.ROOT / "kernels")
    report = Report(tmp_path / "out", variables, {})
    report.run(
        python(
            "import",
            "import os, ecore_kernels, benchmarks; print(ecore_kernels.__file__, os.environ.get('TRITON_INTERPRET'))",
        )
    )
    (record,) = report.records
    assert record["end_of_output"] == [f"{gpu.ROOT / 'kernels/ecore_kernels/__init__.py'} None"]


def test_checks_run_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: set(range(16)))
    names = [step.name for step in gpu.checks(tmp_path, 10.0, trains=True)]
    assert names[:3] == ["tests", "compute-sanitizer memcheck", "compute-sanitizer racecheck"]
    assert len(names) == 10
    assert names[-1] == "compile training"
    assert len(gpu.checks(tmp_path, 10.0, trains=False)) == 9
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: {0, 1})
    (tests,) = gpu.checks(tmp_path, 10.0, trains=True)
    assert "-n" not in tests.command
    assert str(tmp_path / "tests.xml") in tests.command


def test_what_a_step_can_import(tmp_path):
    variables = gpu.environment(tmp_path, gpu.ROOT / "kernels")
    assert gpu.imports("ecore_kernels", variables)
    assert not gpu.imports("ecore_kernels.no_such_module", variables)


def test_training_results_are_told(report):
    report.folder.mkdir()
    timing = {"minimum": 0.01, "median": 0.012, "p20": 0.011, "p80": 0.013, "measurements": 7, "calls": 1}
    row = {"configuration": "all, CUDA graphs", "timing": timing, "u": 90.0, "speedup_median": 5.0}
    document = {"preset": "paper", "device": "cuda", "data": "made up", "u_seconds": 1e-4, "growth": []}
    document |= {"configurations": [row | {"peak_memory_mib": 900.0, "warm_up_seconds": 4.0}]}
    document["parts"] = {"plain": {"optimiser": 0.1}, "all": {"optimiser": 0.2}}
    (report.folder / "training.json").write_text(json.dumps({"results": [document]}))
    report.note("something", "there is none")
    (told,) = [line for line in (report.folder / "summary.md").read_text().splitlines() if "CUDA" in line]
    assert [cell.strip() for cell in told.split("|")[1:4]] == ["all, CUDA graphs", "90.00", "12 ms"]


@pytest.mark.parametrize("cores, data", [(16, True), (2, False)])
def test_training_is_timed_where_ecore_can_be_imported(monkeypatch, tmp_path, cores, data):
    run, steps = Report.run, []

    def stand_in(self, *given):
        steps.extend(given)
        run(self, *(python(step.name, "pass") for step in given))

    monkeypatch.setattr(Report, "run", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.harness.machine", lambda: {"gpu": "a GPU"})
    monkeypatch.setattr(gpu, "has_extension", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert gpu.main(["--out", str(tmp_path / "out"), *(["--data", "prepared"] if data else [])]) == 0
    names = [step.name for step in steps]
    assert names.index("otsu") < names.index("training") < names.index("operators")
    command = steps[names.index("training")].command
    assert ("--compile" in command) == (cores == 16)
    assert ("--run-steps" in command) == ("--data" in command) == data
    steps.clear()
    monkeypatch.setattr(gpu, "imports", lambda *_: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0
    assert "training" not in [step.name for step in steps]
    assert "training: left out" in (tmp_path / "out/summary.md").read_text()
