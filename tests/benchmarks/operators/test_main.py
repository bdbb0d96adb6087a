"""The operators' benchmark on tiny sizes: what a row says, and that nothing wrong gets a time."""

import dataclasses
import json

import pytest
import torch

from benchmarks import harness
from benchmarks.operators import candidates, floors, problems, runner
from benchmarks.operators.__main__ import main
from benchmarks.operators.plan import plan
from benchmarks.operators.problems import Problem
from benchmarks.operators.report import load, report, show

TINY = Problem("graph_attention", 17, batch=2, resolutions=2, emotions=4, dim=6)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The reference in our kernels' place, no compiler, few measurements, ceilings that cost nothing."""
    monkeypatch.setattr(candidates, "FUSED_BACKEND", {"cpu": "reference", "cuda": "triton"})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(runner, "MEASUREMENTS", (3, 3))
    monkeypatch.setattr(problems, "INPUT_BYTES", 1)
    monkeypatch.setattr(floors, "ceilings", lambda device, precision: floors.Ceilings(1e10, 1e11))
    timed = harness.interleaved
    monkeypatch.setattr(
        harness, "interleaved", lambda calls, **options: timed(calls, **(options | {"seconds_each": 0.0}))
    )


def test_rows_say_everything(tmp_path):
    wanted = [(TINY, "forward+backward"), (TINY, "forward")]
    out = tmp_path / "result.json"
    calls = []

    def done(results):
        calls.append(len(results))
        harness.write_json(out, "operators", results)

    results = runner.run(wanted, "cpu", done=done)
    assert calls == [1, 2, 3, 4, 4]
    assert [(r["direction"], r["masks"]) for r in results] == [
        (direction, masks) for _, direction in wanted for masks in ("all", "real")
    ]
    for result in results:
        entries = result["candidates"]
        assert set(entries) == {"fused", "reference", "compiled", "flex"}
        backward = result["direction"] == "forward+backward"
        assert entries["flex"].get("refused") == ("has no backward on CPU" if backward else None)
        timed = {name for name, entry in entries.items() if "timing" in entry}
        assert timed == {"fused", "reference", "compiled"} | (set() if backward else {"flex"})
        assert set(result["ratios"]) == timed - {"fused"}
        ours, reference = entries["fused"], entries["reference"]
        assert result["ratios"]["reference"]["timing"] == reference["timing"].median / ours["timing"].median
        least = reference["timing"].minimum / ours["timing"].minimum
        assert result["ratios"]["reference"]["timing_minimum"] == least
        assert 0 < ours["timing_floor_reached"] < 1
        assert ours["peak_memory"] >= 2 * 2 * 17 * 17 * 4
        assert ours["error"] < problems.LIMITS["ieee"]
        assert entries["compiled"]["compile_seconds"] > 0
        assert result["floor"]["seconds"] > 0
        assert result["judged"] == "all rows"
    document = json.loads(out.read_text())
    assert document["machine"]["packages"]["torch"]
    assert document["results"][0]["candidates"]["fused"]["timing"]["median"] > 0
    assert report(load(out)) == report(results)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "spoil, what", [("output", "output0 is off"), ("gradient", "gradient of key0 is off")]
)
def test_a_wrong_candidate_gets_no_time(monkeypatch, spoil, what):
    def build(name, problem, device, backward):
        candidate = right(name, problem, device, backward)
        if name != "fused":
            return candidate

        def operation(tensors):
            if spoil == "output":
                return tuple(1.01 * output for output in candidate.operation(tensors))
            key = tensors["key0"]
            return candidate.operation(tensors | {"key0": key.detach() + 0.99 * (key - key.detach())})

        return dataclasses.replace(candidate, operation=operation)

    right = candidates.build
    monkeypatch.setattr(candidates, "build", build)
    (result,) = runner.run([(TINY, "forward+backward")], "cpu", masks=("all",))
    ours = result["candidates"]["fused"]
    assert ours["refused"].startswith("wrong: ")
    assert what in ours["refused"]
    assert "timing" not in ours
    assert result["ratios"] == {}
    assert "timing" in result["candidates"]["reference"]
    text = report([result])
    assert "fused: wrong" in text
    assert "LOST" not in text


def test_a_failing_candidate_does_not_stop_the_others(monkeypatch):
    def fail(problem, tensors):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nand so on")

    monkeypatch.setattr(problems, "plain", fail)
    (result,) = runner.run([(TINY, "forward")], "cpu", masks=("real",))
    assert result["candidates"]["compiled"]["refused"] == "out of memory"
    assert "timing" in result["candidates"]["flex"]


def test_losses_are_marked():
    def entry(seconds, memory, **more):
        timing = harness.Timing(seconds / 2, seconds, seconds, seconds, 3, 1)
        return {"timing": timing, "peak_memory": memory, **more}

    result = {
        **dataclasses.asdict(TINY),
        "direction": "forward",
        "floor": {"bound": "memory"},
        "candidates": {
            "fused": entry(2e-3, 2**20, timing_floor_reached=0.25, launches=1),
            "reference": entry(8e-3, 2**23),
            "compiled": entry(1e-3, 2**22),
            "flex": {"refused": "out of memory"},
        },
        "ratios": {
            "reference": {
                "timing": 4.0,
                "timing_minimum": 3.9,
                "replay": 6.0,
                "replay_minimum": 7.0,
                "memory": 8.0,
            },
            "compiled": {"timing": 0.5, "timing_minimum": 1.1, "memory": 4.0},
        },
    }
    cells = show(result)
    assert cells[-1] == "LOST to compiled"
    assert cells[5:10] == ["2 ms (2 ms – 2 ms)", "–", "25.0 % (memory)", "1", "1 MiB"]
    assert cells[10:14] == ["4.00 (3.90); 6.00 (7.00)", "0.50 (1.10)", "–", "8.0"]
    text = report([result])
    assert "- flex: out of memory [17 all ieee forward depth 1]" in text


def test_no_time_left():
    results = runner.run([(TINY, "forward")], "cpu", budget=-1.0)
    assert [result["refused"] for result in results] == ["no time was left"]
    assert "not measured: no time was left" in report(results)


def test_an_error_that_takes_the_gpu_away_costs_one_row(monkeypatch, tmp_path, capsys):
    """The row says so, those before it are kept, and the same command with --resume goes on behind it."""
    out, calls = tmp_path / "result.json", []
    flags = ["--operators", "edge_readout", "--nodes", "35", "--precision", "ieee", "--out", str(out)]
    real = runner.Runner.row

    def row(self, masks):
        calls.append((self.direction, masks))
        if len(calls) == 2:
            monkeypatch.setattr(runner, "lost", lambda device: True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(self, masks)

    monkeypatch.setattr(runner.Runner, "row", row)
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == runner.LOST_DEVICE
    kept = load(out)
    assert [result.get("refused", "")[:10] for result in kept] == ["", "CUDA error"]
    monkeypatch.setattr(runner, "lost", lambda device: False)
    main([*flags, "--resume"])
    assert len(calls) == len(set(calls)) == 4
    assert load(out)[:2] == kept
    assert [result.get("refused") for result in load(out)[2:]] == [None, None]
    # Of what had no time the row goes when it is measured.
    results = runner.run([(TINY, "forward")], "cpu", budget=-1.0)
    (result,) = runner.run([(TINY, "forward")], "cpu", masks=("real",), before=results)
    assert "refused" not in result


def test_plan_begins_with_the_most_informative():
    wanted = plan("cuda", problems.OPERATORS, None, None, None)
    first = [(p.operator, p.nodes, p.precision, p.depth, direction) for p, direction in wanted[:4]]
    assert first == [
        ("graph_attention", nodes, precision, 1, "forward+backward")
        for nodes in (160, 288)
        for precision in ("tf32", "bfloat16")
    ]
    soon = {(p.operator, p.nodes, direction) for p, direction in wanted[:32]}
    assert soon >= {(operator, 160, "forward+backward") for operator in problems.OPERATORS}
    assert soon >= {("graph_attention", nodes, "forward+backward") for nodes in (96, 4096, 16384)}
    ieee = [problem.precision == "ieee" for problem, _ in wanted]
    assert ieee == sorted(ieee)
    assert {problem.batch for problem, _ in wanted if problem.nodes >= 2048} == {1}
    assert {p.depth for p, _ in wanted if p.operator == "edge_attention"} == {0, 1}
    deeper = plan("cuda", ["graph_attention", "edge_readout"], [160], ["tf32"], [0, 2])
    assert {(p.operator, p.depth) for p, _ in deeper} == {
        ("graph_attention", 0),
        ("graph_attention", 2),
        ("edge_readout", 2),
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--precision", "tf32"], "tf32 is a GPU's precision"),
        (["--nodes", "32"], "at least 33"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line(capsys, tmp_path):
    out = tmp_path / "result.json"
    main(["--operators", "edge_readout", "--nodes", "35", "--masks", "real", "--out", str(out)])
    assert "## edge_readout" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["results"]) == 2


def test_compile_only(capsys):
    main(["--operators", "edge_attention", "--nodes", "34", "--compile-only"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # FlexAttention's forward without the update is the only one that it can do here.
    assert sorted((line[3], line[4]) for line in lines) == [
        *[("forward", "compiled")] * 2,
        ("forward", "flex"),
        *[("forward+backward", "compiled")] * 2,
    ]
    assert all(float(line[5]) > 0 for line in lines)


def test_peak_memory_of_a_call():
    def call(number):
        first = torch.ones(2**20)
        second = first + 1
        del first
        return second.sum()

    assert harness.peak_memory(call, "cpu") == pytest.approx(2 * 2**22, abs=2**12)


@pytest.mark.gpu
def test_on_a_gpu():
    problem = Problem("graph_attention", 77, batch=2, precision="tf32")
    (result,) = runner.run([(problem, "forward+backward")], "cuda", masks=("real",))
    for name in ("fused", "reference"):
        entry = result["candidates"][name]
        assert "refused" not in entry
        assert entry["launches"] > 0
        assert entry["peak_memory"] > 0
        assert entry["replay"].median > 0
    assert result["ratios"]["reference"]["replay"] > 0
