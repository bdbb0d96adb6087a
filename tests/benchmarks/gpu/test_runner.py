"""Processes that fail, hang and flood, and what they leave."""

import json
import os
import signal
import time

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu.runner import OK, STOPPED, Process, Session

# Deaf to SIGTERM, and the parent of a process that would outlive it.
HANGING = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("on it", flush=True)
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
open({path!r}, "w").write(str(subprocess.Popen([sys.executable, "-c", child]).pid))
time.sleep(60)
"""


def outcomes(session):
    return {record["step"]: record["outcome"] for record in session.records}


def test_failing_and_hanging_processes_are_survived(session, python, ends, tmp_path):
    child = tmp_path / "pid"
    session.run(
        python("good", "print('fine')"),
        python("bad", "print('before'); raise SystemExit(3)"),
        python("hanging", HANGING.format(path=str(child)), seconds=3.0, patience=0.5),
        Process("missing", ["/no/such/program"], 5.0),
        python("optional", "raise SystemExit(1)", required=False),
    )
    found = outcomes(session)
    assert found.pop("missing").startswith("did not start: ")
    assert found == {"good": OK, "bad": "exit code 3", "hanging": STOPPED, "optional": "exit code 1"}
    assert sorted(session.failures) == ["bad", "hanging", "missing"]
    session.run(python("next", "print('it goes on')"))

    summary = json.loads((session.folder / "summary.json").read_text())
    assert [record["step"] for record in summary["steps"]][-1] == "next"
    assert sorted(summary["failures"]) == ["bad", "hanging", "missing"]
    text = (session.folder / "summary.md").read_text()
    assert "- stage: hanging: stopped at its limit" in text
    assert "## stage: bad: the end of its output\n\n```\nbefore" in text
    assert "## stage: optional" not in text
    log = (session.folder / "log.txt").read_text()
    assert all(words in log for words in ("fine", "on it", "it goes on"))
    assert ends(int(child.read_text()))


def test_a_process_that_is_asked_to_stop_has_its_patience(session, python, tmp_path):
    """As a training needs it, which writes a checkpoint then."""
    code = f"""
import signal, sys, time
def stop(*_):
    time.sleep(2.0)
    open({str(tmp_path / "checkpoint")!r}, "w")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""
    session.run(python("training", code, seconds=3.0, patience=20.0))
    assert outcomes(session) == {"training": STOPPED}
    assert (tmp_path / "checkpoint").exists()


def test_children_of_a_process_that_ended_well_are_ended(session, python, ends, tmp_path):
    child = tmp_path / "pid"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(child)!r}, "w").write(str(child.pid))
"""
    session.run(python("parent", code))
    assert outcomes(session) == {"parent": OK}
    assert ends(int(child.read_text()))


def test_results_are_written_while_others_run(session, python, monkeypatch):
    """Rows of a process that is still running too."""
    monkeypatch.setattr(runner, "RESULTS_SECONDS", 0.1)
    path = session.result("rows")
    write = f"""
import pathlib, time
path = pathlib.Path({str(path)!r})
path.write_text('{{"results": [1]}}')
results = pathlib.Path({str(session.folder / "results.json")!r})
while not results.exists() or '"results"' not in results.read_text(): time.sleep(0.05)
path.write_text('{{"results": [1, 2]}}')
"""
    look = f"""
import json, pathlib, time
path = pathlib.Path({str(session.folder / "summary.json")!r})
while not json.loads(path.read_text())["steps"]: time.sleep(0.05)
assert [s["step"] for s in json.loads(path.read_text())["steps"]] == ["quick"]
"""
    session.run(python("looking", look), python("quick", "pass"))
    session.run(python("rows", write))
    assert set(outcomes(session).values()) == {OK}
    assert json.loads((session.folder / "results.json").read_text()) == {"rows": {"results": [1, 2]}}


def test_the_end_of_all_time_stops_every_process(tmp_path, python):
    (tmp_path / "scratch").mkdir()
    session = Session(tmp_path / "out", tmp_path / "scratch", dict(os.environ), {}, seconds=2.0)
    start = time.monotonic()
    assert session.begin_stage("first", 100.0)
    session.run(python("long", "import time; time.sleep(50)", seconds=100.0))
    assert not session.begin_stage("second", 100.0)
    assert time.monotonic() - start < 20
    assert outcomes(session) == {"long": STOPPED, "second": "left out: no time was left"}
    assert session.failures == ["long", "second"]


def test_no_process_outlasts_its_stage(session, python):
    session.begin_stage("short", 1.0)
    start = time.monotonic()
    session.run(python("long", "import time; time.sleep(50)", seconds=100.0))
    assert outcomes(session) == {"long": STOPPED}
    assert time.monotonic() - start < 20


def test_processes_in_the_background(session, python, tmp_path):
    """So many at once, beside others; measuring waits for them, but not for ever."""
    started = [tmp_path / str(number) for number in range(3)]
    code = "import pathlib, time; pathlib.Path({!r}).touch(); time.sleep({})"
    last = [0, 0, 60]
    session.in_background(
        [
            python(f"fill {n}", code.format(str(path), last[n]), required=False)
            for n, path in enumerate([*started])
        ],
        at_once=1,
    )
    session.run(python("beside", "pass"))
    session.join(8.0)  # two more start in a fraction of that, and the last runs until then
    found = outcomes(session)
    assert found["beside"] == found["fill 0"] == found["fill 1"] == OK
    assert found["fill 2"] == STOPPED
    assert not session.failures
    assert all(path.exists() for path in started)
    session.in_background(
        [python(f"late {n}", "import time; time.sleep(60)", required=False) for n in (0, 1)], 1
    )
    session.join(0.5)
    assert outcomes(session)["late 1"] == "not started: no time was left"


def test_files_stay_few_and_small(session, python, monkeypatch):
    others = {"checkpoint.pt": b" " * 100, "download.part": b"half"}
    for name, content in others.items():
        (session.folder / name).write_bytes(content)
    monkeypatch.setattr(runner, "LOG_BYTES", 2**19)
    session.run(*(python(f"flood {n}", "print('x' * 3_000_000); print('the end')") for n in range(3)))
    log = (session.folder / "log.txt").read_text()
    assert len(log) < 1.1 * 2**19
    assert log.rstrip().endswith("the end")
    for name, content in others.items():
        assert (session.folder / name).read_bytes() == content
    names = {file.name for file in session.folder.iterdir()} - set(others)
    assert names <= set(runner.FILES)
    # A later session leaves nothing of this one, and what is not ours.
    (session.folder / "weights-3.safetensors").touch()
    Session(session.folder, session.scratch, {}, {})
    assert "flood" not in (session.folder / "summary.md").read_text()
    assert not (session.folder / "weights-3.safetensors").exists()
    assert (session.folder / "checkpoint.pt").exists()


def test_interrupted(session, python, monkeypatch):
    def poll():
        raise KeyboardInterrupt

    session.in_background([python("hanging", "import time; time.sleep(50)", patience=1.0)], 1)
    monkeypatch.setattr(session, "_poll", poll)
    with pytest.raises(KeyboardInterrupt):
        session.run(python("other", "import time; time.sleep(50)"))
    session.interrupt()
    assert outcomes(session) == {"hanging": "interrupted", "other": "interrupted"}
    assert "interrupted" in (session.folder / "summary.md").read_text()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_still_ends_the_session(session, python):
    class Destructor:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # the handler raises here, and Python ignores it

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    runner.interrupt_on_signals()
    try:
        dropped = Destructor()
        del dropped
        with pytest.raises(KeyboardInterrupt):
            session.run(python("long", "import time; time.sleep(50)", seconds=100.0))
        session.interrupt()
        session.run(python("after", "pass"))
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert outcomes(session) == {"long": runner.INTERRUPTED, "after": OK}
