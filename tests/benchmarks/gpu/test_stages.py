"""The stages' command lines, limits and order."""

import importlib.util
import json

import pytest

from benchmarks.gpu import stages
from benchmarks.gpu.environment import build_extension, environment
from benchmarks.gpu.runner import ROOT, STOPPED, Process, Session
from benchmarks.gpu.stages import STAGES, Plan
from benchmarks.operators.runner import LOST_DEVICE


@pytest.fixture
def commands(monkeypatch, python):
    """Processes by name; they end as ``code`` says instead of doing their work."""
    run, seen = Session.run, {}

    def stand_in(self, *processes):
        seen.update({process.name: process for process in processes})
        codes = {process.name: stand_in.code.get(process.name, "pass") for process in processes}
        return run(self, *(python(p.name, codes[p.name], p.seconds) for p in processes))

    stand_in.code = {}
    monkeypatch.setattr(Session, "run", stand_in)
    monkeypatch.setattr(stages, "cores", lambda: 2)
    seen["code"] = stand_in.code
    return seen


def value(process, flag):
    return process.command[process.command.index(flag) + 1]


def test_every_stage_runs_in_its_order(session, commands, tmp_path):
    stages.run(session, Plan(tmp_path), dict.fromkeys(STAGES, 1.0))
    ran = list(dict.fromkeys(record["stage"] for record in session.records))
    assert ran == ["smoke", "steps", "operators", "train", "generate", "tests", "sanitize", "tune"]
    assert "ecore_kernels.verify" in commands["verify"].command
    assert commands["memcheck"].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert session.failures == ["evaluate soft"]  # of no training


def test_benchmarks_get_budgets_within_their_limits(session, commands):
    stages.run(session, Plan(), {"steps": 3.0, "operators": 4.0, "tune": 2.0})
    for name, flag in (
        ("time of a step", "--seconds-budget"),
        ("operators", "--seconds-budget"),
        ("tune", "--budget"),
    ):
        process = commands[name]
        assert 0.3 * process.seconds < float(value(process, flag)) < 0.9 * process.seconds, name
    assert commands["time of a step"].seconds <= 180.0
    assert "--data" not in commands["time of a step"].command


def test_training_is_the_command_line(session, commands, tmp_path):
    run = session.scratch / "runs" / "soft"
    commands["code"]["train soft"] = (
        f"import pathlib; run = pathlib.Path({str(run)!r}); run.mkdir(parents=True);"
        f"(run / 'checkpoints.json').touch(); import time; time.sleep(60)"
    )
    plan = Plan(tmp_path / "prepared", ("soft", "none"), steps=70, keep_weights=True)
    stages.run(session, plan, {"train": 0.2})
    train = commands["train soft"]
    assert train.command[2:4] == ["ecore", "train"]
    expected_flags = {
        "--data": str(tmp_path / "prepared"),
        "--strategy": "soft",
        "--max-steps": "70",
        "--precision": "tf32",
    }
    for flag, expected in expected_flags.items():
        assert value(train, flag) == expected
    assert "--cuda-graphs" in train.command
    assert train.patience >= 30.0  # for a checkpoint
    # The limit ended it, and what it left is scored; without a checkpoint there is nothing to score.
    outcomes = {record["step"]: record["outcome"] for record in session.records}
    assert outcomes["train soft"] == STOPPED
    assert outcomes["evaluate soft"] == outcomes["keep weights of soft"] == "ok"
    assert outcomes["evaluate none"] == "left out: the training left no checkpoint"
    assert session.failures == ["train soft", "evaluate none"]
    assert commands["keep weights of soft"].command[-2:] == ["--out", str(session.folder)]
    assert "keep weights of none" not in outcomes
    assert train.seconds < commands["train none"].seconds + 6.0


def test_operators_go_on_after_an_error_that_took_the_gpu_away(session, monkeypatch, python):
    run, seen, codes = Session.run, [], [LOST_DEVICE, LOST_DEVICE, 0, 0, 0, 0, 0]

    def stand_in(self, process):
        seen.append(process.command)
        return run(self, python(process.name, f"raise SystemExit({codes[len(seen) - 1]})"))

    monkeypatch.setattr(Session, "run", stand_in)
    stages.operators(session, Plan())
    assert ["--resume" in command for command in seen] == [False, True, True, False, False, False, False]
    for command, name in zip(seen[3:], stages.FURTHER_OPERATORS, strict=True):
        assert f"benchmarks.{name}" in command


def test_caches_are_filled_beside_the_smoke_test(session, monkeypatch, commands):
    """With cores for it; what is compiled is what is measured."""
    filled, joined = [], []
    monkeypatch.setattr(stages, "cores", lambda: 16)
    monkeypatch.setattr(
        session, "in_background", lambda processes, at_once: filled.append((processes, at_once))
    )
    monkeypatch.setattr(session, "join", lambda seconds: joined.append(list(commands)))
    stages.run(session, Plan(), {"smoke": 1.0, "steps": 1.0, "operators": 1.0})
    ((processes, at_once),) = filled
    assert at_once == 8
    assert len(processes) == 12
    assert joined[0] == ["code", "verify"], "smoke waits for nothing, measurements do"
    measured = commands["time of a step"].command
    for process in processes:
        assert "--compile-only" in process.command
        assert not process.required
        if "benchmarks.training" in process.command:
            shared = process.command[: process.command.index("--compile-only")]
            assert measured[: len(shared)] == shared
    from benchmarks.training.steps import configurations

    named = {value(p, "--only") for p in processes if "--only" in p.command}
    assert named <= set(configurations(True, "cuda"))
    assert len(named) == 6


def test_the_rest_is_named_when_it_is_interrupted(session, commands):
    commands["code"]["time of a step"] = "import time; time.sleep(60)"
    poll, began = session._poll, []

    def interrupted():
        poll()
        if any(running.process.name == "time of a step" for running in session._running):
            began.append(1)
            if len(began) == 3:
                raise KeyboardInterrupt

    session._poll = interrupted
    with pytest.raises(KeyboardInterrupt):
        stages.run(session, Plan(), {"steps": 1.0, "generate": 1.0})
    outcomes = [(record["step"], record["outcome"]) for record in session.records]
    assert outcomes[1:] == [
        ("time of a step", "interrupted"),
        ("steps", "left out: interrupted"),
        ("generate", "left out: interrupted"),
    ]


def test_tests_run_with_what_is_installed(session, commands, monkeypatch):
    monkeypatch.setattr(stages, "cores", lambda: 16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    stages.tests(session, Plan())
    command = commands["tests"].command
    assert "-n" not in command
    assert "addopts=--import-mode=importlib" in command
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    stages.tests(session, Plan())
    assert value(commands["tests"], "-n") == "10"


def test_processes_import_this_checkout(session, python, monkeypatch):
    """The caller's TRITON_INTERPRET does not reach them: their kernels run on a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    session.environment = environment(session.scratch, ROOT / "kernels")
    code = "import os, ecore_kernels, benchmarks; print(ecore_kernels.__file__, os.environ.get('TRITON_INTERPRET'))"
    session.run(python("import", code, seconds=200.0))
    (record,) = session.records
    assert record["end_of_output"] == [f"{ROOT / 'kernels/ecore_kernels/__init__.py'} None"]


def test_the_extension_is_built_without_setuptools(session, python, monkeypatch):
    """The stage gives CMake the options of setup.py; here without a compilation."""
    seen, run = [], session.run
    session.environment = environment(session.scratch, ROOT / "kernels")
    monkeypatch.setattr(session, "run", lambda process: seen.append(process))
    build_extension(session)
    packages = session.scratch / "packages"
    ((_, _, script),) = [process.command for process in seen]
    assert f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={packages}/ecore_kernels" in script
    assert script.endswith(f"&& cmake --build {session.scratch}/build")
    monkeypatch.setattr(session, "run", run)
    session.run(python("import", "import ecore_kernels; print(ecore_kernels.__file__)", seconds=200.0))
    assert session.records[-1]["end_of_output"] == [str(packages / "ecore_kernels/__init__.py")]


def test_a_missing_tool_is_a_failure_with_its_name(session, monkeypatch):
    session.environment = {**session.environment, "PATH": "/nowhere"}
    monkeypatch.setenv("PATH", "/nowhere")
    stages.sanitize(session, Plan())
    assert session.failures == ["memcheck", "racecheck"]
    assert all("compute-sanitizer" in record["outcome"] for record in session.records)


def test_verify_writes_rows_and_its_exit_code_counts(session, monkeypatch, tmp_path):
    """With a module that stands in for the installed one."""
    package = tmp_path / "packages" / "ecore_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "verify.py").write_text(
        "import sys, json\n"
        "assert sys.argv[1:4] == ['--device', 'cuda', '--out'], sys.argv\n"
        "open(sys.argv[4], 'w').write(json.dumps({'rows': [{'operator': 'otsu', 'verdict': 'wrong'}]}))\n"
        "print('otsu is wrong')\n"
        "sys.exit(1)\n"
    )
    session.environment = {**session.environment, "PYTHONPATH": str(package.parent)}
    stages.smoke(session, Plan())
    assert session.failures == ["verify"]
    text = (session.folder / "summary.md").read_text()
    assert "- stage: verify: exit code 1, " in text
    assert '1 wrong\n\n- {"operator": "otsu"' in text
    results = json.loads((session.folder / "results.json").read_text())
    assert results["smoke"]["rows"] == [{"operator": "otsu", "verdict": "wrong"}]


def test_a_stage_has_limits_that_add_up():
    assert all(stage.minutes > 0 for stage in STAGES.values())
    assert sum(stage.minutes for stage in STAGES.values()) < 100
    assert isinstance(STAGES["steps"].fills(Plan())[0], Process)
