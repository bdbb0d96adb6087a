"""The one command for a GPU, with steps that stand in for its own: failing, hanging and flooding ones."""

import json
import os
import sys
import time

import pytest
import torch

from benchmarks import gpu, operators
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
    (report.folder / "otsu.json").write_bytes(b" " * (gpu.LARGEST_FILE + 1))
    (report.folder / "operators.json.part").write_text("torn")
    others = {"checkpoint.pt": b" " * (gpu.LARGEST_FILE + 1), "download.part": b"half"}
    for name, content in others.items():
        (report.folder / name).write_bytes(content)
    report.run(python("flood", "print('x' * 3_000_000); print('the end')"))
    assert (report.folder / "log.txt").stat().st_size < 1.1 * gpu.LOG_BYTES
    assert "the end" in (report.folder / "log.txt").read_text()
    for name, content in others.items():
        assert (report.folder / name).read_bytes() == content
        (report.folder / name).unlink()
    files = list(report.folder.rglob("*"))
    assert {file.name for file in files} == {"summary.json", "summary.md", "log.txt", "otsu.json"}
    assert all(file.stat().st_size < gpu.LARGEST_FILE for file in files)


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
def test_hangs():
    import time
    time.sleep(60)
"""


def test_killed_tests_leave_what_they_knew(report, tmp_path):
    """And one file that cannot be imported keeps no other from running."""
    (tmp_path / "test_a.py").write_text("import no_such_module")
    (tmp_path / "test_b.py").write_text(TESTS)
    lines = report.folder / "tests.jsonl"
    report.folder.mkdir()
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.pytest_lines", "--lines", str(lines)]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    report.run(Step("tests", [*command, "-c", os.devnull, str(tmp_path)], 15.0))
    assert [record["outcome"] for record in report.records] == ["stopped: its time was over"]
    results = gpu.test_results(lines)
    assert (results["passed"], results["skipped"]) == (1, 1)
    failed = {name.rpartition("::")[2]: why for name, why in results["failed"].items()}
    assert sorted(failed) == ["test_a.py", "test_bad", "test_broken"]
    assert "no_such_module" in failed["test_a.py"]
    text = (report.folder / "summary.md").read_text()
    assert "1 passed, 1 skipped, 3 failed" in text
    assert "test_b.py::test_broken: " in text
    assert "wrong sum" in lines.read_text()
    with lines.open("a") as file:
        file.write('{"test": "torn')
    assert gpu.test_results(lines) == results
    assert gpu.test_results(tmp_path / "none.jsonl") is None


def test_what_tells_most_runs_first(report, tmp_path):
    for name in ("test_a.py", "deep/test_b.py", "deep/test_c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("def test_one(): pass\ndef test_two(): pass")
    lines = tmp_path / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.pytest_lines", "--lines", str(lines)]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", os.devnull]
    report.run(Step("tests", [*command, "--first", "deep/test_c.py", "--first", "deep", str(tmp_path)], 60.0))
    assert [record["outcome"] for record in report.records] == ["ok"]
    ran = [json.loads(line)["test"].rpartition("/")[2] for line in lines.read_text().splitlines()]
    assert ran == [f"test_{file}.py::test_{name}" for file in "cba" for name in ("one", "two")]


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
            seconds=200.0,
        )
    )
    (record,) = report.records
    assert record["end_of_output"] == [f"{gpu.ROOT / 'kernels/ecore_kernels/__init__.py'} None"]


def test_checks_run_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: set(range(16)))
    steps = gpu.checks(tmp_path, 10.0, trains=True, data=tmp_path / "prepared")
    names = [step.name for step in steps]
    assert names[:3] == ["tests", "compute-sanitizer memcheck", "compute-sanitizer racecheck"]
    assert len(names) == 10
    assert names[-1] == "compile training"
    # What is compiled depends on the data: only the same fills the cache for the steps that are timed.
    assert gpu.training(tmp_path / "prepared", "--compile-only") == steps[-1].command[2:]
    assert len(gpu.checks(tmp_path, 10.0, trains=False)) == 9
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: {0, 1})
    (tests,) = gpu.checks(tmp_path, 10.0, trains=True)
    assert "-n" not in tests.command
    assert str(tmp_path / "tests.jsonl") in tests.command


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


@pytest.fixture
def machine(monkeypatch):
    """A GPU, sixteen cores and an extension; steps are noted and end well without doing anything."""
    run, steps = Report.run, []

    def stand_in(self, *given):
        steps.extend(given)
        run(self, *(python(step.name, "pass") for step in given))

    monkeypatch.setattr(Report, "run", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.harness.machine", lambda: {"gpu": "a GPU"})
    monkeypatch.setattr(gpu, "has_extension", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: set(range(16)))
    return steps


@pytest.mark.parametrize("cores, data", [(16, True), (2, False)])
def test_training_is_timed_where_ecore_can_be_imported(machine, monkeypatch, tmp_path, cores, data):
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: set(range(cores)))
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared/meta.json").write_text("{}")
    flags = ["--data", str(tmp_path / "prepared")] if data else []
    assert gpu.main(["--out", str(tmp_path / "out"), *flags]) == 0
    names = [step.name for step in machine]
    assert names.index("operators") < names.index("training") < names.index("otsu")
    assert ("whole trainings" in names) == data
    command = machine[names.index("training")].command
    assert ("--compile" in command) == (cores == 16)
    assert ("--data" in command) == data
    machine.clear()
    monkeypatch.setattr(gpu, "imports", lambda *_: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0
    assert not {"training", "whole trainings"} & {step.name for step in machine}
    assert "training: left out" in (tmp_path / "out/summary.md").read_text()


def test_a_wrong_data_folder_is_told_at_once(machine, tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"gpu: --data: {tmp_path}: expected a folder made by `ecore prepare`\n"
    assert not machine


def test_operators_go_on_after_an_error_that_took_the_gpu_away(monkeypatch, report):
    run, commands, codes = Report.run, [], [operators.LOST_DEVICE, operators.LOST_DEVICE, 0]

    def stand_in(self, step):
        commands.append(step.command)
        run(self, python(step.name, f"raise SystemExit({codes[len(commands) - 1]})"))

    monkeypatch.setattr(Report, "run", stand_in)
    gpu.measure_operators(report, report.folder, 5.0)
    assert ["--resume" in command for command in commands] == [False, True, True]
    assert report.failed()


def test_a_report_that_fails_loses_nothing(report):
    report.folder.mkdir()
    (report.folder / "training.json").write_text('{"results": [{}]}')
    report.note("something", "there is none")
    text = (report.folder / "summary.md").read_text()
    assert "- something: left out: there is none" in text
    assert "training.json: KeyError: 'preset'" in text


def test_the_extension_is_built_without_setuptools(monkeypatch, tmp_path):
    """What CMake is asked for is what setup.py asks it for; here without a compilation."""
    commands = []
    monkeypatch.setattr(Report, "run", lambda self, step: commands.append(step.command))
    monkeypatch.setattr(gpu, "has_extension", lambda folder: (folder / "ecore_kernels/__init__.py").exists())
    packages = gpu.build_extension(Report(tmp_path / "out", {}, {}), tmp_path)
    assert packages == tmp_path / "packages"
    ((_, _, script),) = commands
    assert f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={packages}/ecore_kernels" in script
    assert script.endswith(f"&& cmake --build {tmp_path}/build")
