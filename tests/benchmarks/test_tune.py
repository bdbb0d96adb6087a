"""Tuning without a GPU: the search, and the table's rewriting."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.tune import Setting
from ecore_kernels.triton_kernels import launch

GRID = {"BLOCK": (16, 32, 64), "STEP": (16, 32, 64), "RELOAD": (False, True), "num_warps": (4, 8)}
START = {"BLOCK": 16, "STEP": 16, "RELOAD": True, "num_warps": 4}
SETTING = Setting("graph_attention_backward", "tf32", 1)


def test_search_finds_the_best():
    asked = []

    def measure(configurations):
        asked.extend(configurations)
        best = {"BLOCK": 64, "STEP": 32, "RELOAD": False, "num_warps": 4}
        return [1.0 + sum(c[name] != value for name, value in best.items()) for c in configurations]

    found, seconds, first = tune.search(START, GRID, measure)
    assert found == {"BLOCK": 64, "STEP": 32, "RELOAD": False, "num_warps": 4}
    assert (seconds, first) == (1.0, 4.0)
    assert asked[0] == START
    assert len(asked) == len({json.dumps(c) for c in asked})  # nothing twice


def test_search_keeps_what_works():
    def measure(configurations):
        return [1.0 if c == START else math.inf if c["BLOCK"] == 64 else 0.99 for c in configurations]

    assert tune.search(START, GRID, measure) == (START, 1.0, 1.0)  # one per cent is noise
    # From a configuration that does not run at all, anything that does is better.
    found, seconds, first = tune.search(
        START, GRID, lambda many: [math.inf if c == START else 5.0 for c in many]
    )
    assert found != START
    assert (seconds, first) == (5.0, math.inf)


def test_search_tries_other_configurations_first():
    """Several places away, where no step on the way is worth taking."""
    far = START | {"BLOCK": 64, "STEP": 64, "num_warps": 8}
    rounds = []

    def measure(configurations):
        rounds.append(configurations)
        return [0.5 if c == far else 1.0 for c in configurations]

    assert tune.search(START, GRID, measure) == (START, 1.0, 1.0)
    rounds.clear()
    assert tune.search(START, GRID, measure, others=(START, far)) == (far, 0.5, 1.0)
    assert rounds[:2] == [[START], [far, *tune.variants(START, GRID)]]
    assert far not in rounds[2]


def test_what_tells_most_comes_first():
    """A budget may end before the rest."""
    settings = [
        Setting(f"{operator}_{direction}", arithmetic, depth)
        for arithmetic in ("ieee", "half", "tf32")
        for operator, depths in tune.DEPTHS.items()
        for depth in depths
        for direction in ("forward", "backward")
    ]
    found = tune.ordered(settings)
    assert sorted(map(str, found)) == sorted(map(str, settings))
    first = {(s.operator, s.depth, s.arithmetic) for s in found[: tune.SETTINGS_AT_ONCE]}
    calls = (("graph_attention", 0), ("graph_attention", 1), ("edge_readout", 2))
    assert first == {(*call, arithmetic) for call in calls for arithmetic in ("half", "tf32")}
    assert {s.arithmetic for s in found[-16:]} == {"ieee"}


def test_the_far_behind_are_timed_on_one_input_alone(monkeypatch):
    bench = tune.Bench.__new__(tune.Bench)
    bench.setting, bench.inputs = SETTING, [1, 2, 3]
    bench.pool = type(
        "Pool", (), {"compile": lambda self, jobs: ["no" if c["a"] == 9 else "" for _, c in jobs]}
    )()
    asked = []

    def seconds(configuration, inputs):
        asked.append((configuration["a"], len(inputs)))
        return {1: 1.0, 2: 1.1, 3: 1.2, 4: math.inf}[configuration["a"]] * len(inputs)

    monkeypatch.setattr(bench, "_seconds", seconds)
    measured = bench.measure([{"a": a} for a in (9, 3, 1, 4, 2)])
    assert measured == [math.inf, math.inf, 3.0, math.inf, pytest.approx(3.3)]
    assert asked == [(3, 1), (1, 1), (4, 1), (2, 1), (1, 3), (2, 3)]
    assert bench.measure([{"a": 4}, {"a": 9}]) == [math.inf, math.inf]


def test_search_stops_in_time():
    assert tune.search(START, GRID, lambda many: [1.0] * len(many), lambda: False) == (START, 1.0, 1.0)


def test_every_constant_of_the_table_can_be_searched():
    for row in json.loads(launch.TABLE.read_text()):
        start = {**row["constants"], **{name: row[name] for name in tune.OPTIONS}}
        grid = tune.grid_of(start, row["arithmetic"])
        assert set(grid) == set(start), row
        if row["arithmetic"] == "ieee":
            assert max(v for name in ("BLOCK", "STEP") for v in grid.get(name, (0,))) <= 32


def test_larger_configurations_are_for_new_cards_alone():
    for (kernel, arithmetic), configurations in tune.HOPPER.items():
        setting = Setting(kernel, arithmetic, max(tune.DEPTHS[kernel.rpartition("_")[0]]))
        constants, options = launch.configuration(kernel, arithmetic, 128, setting.depth, 90)
        start = {**constants, **options}
        assert tune.larger(setting, 89) == ()
        assert tune.larger(setting, 90) == configurations
        assert tune.first_round(setting, start, 90)[: len(configurations) + 1] == [start, *configurations]
        for configuration in configurations:
            assert list(configuration) == list(start)


COMPILE_LARGER = """
import json
from benchmarks import tune
from ecore_kernels.triton_kernels import compile
if __name__ == "__main__":
    found = []
    for (kernel, arithmetic), configurations in tune.HOPPER.items():
        operator = kernel.rpartition("_")[0]
        entry = compile.Entry(kernel, arithmetic, 100, tune.DEPTHS[operator][0], 90)
        for configuration in configurations:
            with tune.using(kernel, configuration):
                result = compile.compile_entry(entry)
            found.append([f"{kernel} {arithmetic} {configuration}", result.problem, result.spills])
    print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_larger_configurations_compile_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # from another cache the assembler would not report
    root = Path(tune.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", COMPILE_LARGER], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == sum(map(len, tune.HOPPER.values())) > 0
    assert [line for line in found if line[1] or line[2]] == []


def test_unchanged_table_is_the_same_bytes():
    written = launch.TABLE.read_text()
    rows = json.loads(written)
    assert tune.text(rows) == written
    row = rows[0]
    same = {**row["constants"], **{name: row[name] for name in tune.OPTIONS}}
    setting = Setting(row["kernel"], row["arithmetic"], row["depth"])
    again = tune.rewritten(rows, setting, row["head"], row["architecture"], same)
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, rows))


ROWS = [
    {
        "kernel": kernel,
        "arithmetic": arithmetic,
        "head": 128,
        "depth": 0,
        "architecture": architecture,
        "constants": {"BLOCK": architecture},
        "num_warps": 4,
        "num_stages": 1,
    }
    for kernel in ("graph_attention_forward", "graph_attention_backward")
    for arithmetic in ("half", "tf32")
    for architecture in (80, 89)
]
FOUND = {"BLOCK": 7, "num_warps": 8, "num_stages": 2}


@pytest.fixture
def lookup(monkeypatch, tmp_path):
    """Rows to a function that looks them up as a launch would."""

    def table_of(rows):
        path = tmp_path / "table.json"
        path.write_text(tune.text(rows))
        monkeypatch.setattr(launch, "TABLE", path)
        launch.table.cache_clear()
        launch.configuration.cache_clear()
        return launch.configuration

    yield table_of
    monkeypatch.undo()
    launch.table.cache_clear()
    launch.configuration.cache_clear()


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("architecture", [86, 89, 90])
def test_only_what_was_measured_changes(lookup, depth, architecture):
    setting = Setting("graph_attention_backward", "tf32", depth)
    keys = [
        (kernel, arithmetic, 128, deep, card)
        for kernel in ("graph_attention_forward", "graph_attention_backward")
        for arithmetic in ("half", "tf32")
        for deep in range(5)
        for card in (80, 86, 87, 89, 90, 100)
    ]
    before = {key: lookup(ROWS)(*key) for key in keys}
    rows = tune.rewritten(ROWS, setting, 128, architecture, FOUND)
    configuration = lookup(rows)
    assert configuration(setting.kernel, "tf32", 128, depth, architecture) == (
        {"BLOCK": 7},
        {"num_warps": 8, "num_stages": 2},
    )
    for key in keys:
        kernel, arithmetic, _, deep, card = key
        # A new entry also serves what has no nearer one: greater depths, newer cards without an entry of their own.
        newer = [row["architecture"] for row in ROWS if row["architecture"] > architecture]
        reached = deep >= depth and architecture <= card < min(newer, default=1000)
        if (kernel, arithmetic) != (setting.kernel, "tf32") or not reached:
            assert configuration(*key) == before[key], key
    # Measured again, an entry is replaced.
    twice = tune.rewritten(rows, setting, 128, architecture, FOUND | {"BLOCK": 9})
    assert len(twice) == len(rows)
    assert lookup(twice)(setting.kernel, "tf32", 128, depth, architecture)[0] == {"BLOCK": 9}


def test_rows_keep_the_tables_order():
    rows = tune.rewritten(ROWS, SETTING, 128, 90, FOUND)
    order = [(r["kernel"], r["arithmetic"], r["depth"], r["architecture"]) for r in rows]
    assert order[:6] == [(r["kernel"], r["arithmetic"], r["depth"], r["architecture"]) for r in ROWS[:6]]
    assert order[6:] == [
        ("graph_attention_backward", "tf32", depth, card)
        for depth, card in ((0, 80), (0, 89), (1, 80), (1, 89), (1, 90))
    ]
    lines = tune.text(rows).splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("[", "]", len(rows) + 2)


def test_a_kernel_is_launched_with_the_candidate():
    key = ("graph_attention_forward", "tf32", 128, 1, 80)
    before = launch.configuration(*key)
    with tune.using("graph_attention_forward", FOUND):
        assert launch.configuration(*key) == ({"BLOCK": 7}, {"num_warps": 8, "num_stages": 2})
        other = launch.configuration("graph_attention_backward", *key[1:])
        assert other[0]["BLOCK"] != 7
    assert launch.configuration(*key) == before


def test_pool_survives_hanging_and_lost_processes(monkeypatch):
    """A configuration that takes for ever, and one after which its process can use the GPU no more."""

    class Result:
        def __init__(self, value):
            self.value = value

        def get(self, timeout):
            if self.value is None:
                raise tune.multiprocessing.TimeoutError
            return self.value

        def ready(self):
            return self.value is not None

    made = []

    class Processes:
        def __init__(self, number):
            self.lost = False
            made.append(self)

        def apply_async(self, function, arguments):
            (_, configuration) = arguments
            if configuration == "hangs":
                return Result(None)
            self.lost = self.lost or configuration == "breaks"
            return Result("RuntimeError: CUDA error: illegal" if self.lost else "")

        def terminate(self):
            pass

        join = terminate

    context = type("Context", (), {"Pool": Processes})
    monkeypatch.setattr(tune.multiprocessing, "get_context", lambda _: context)
    pool = tune.Pool(1)
    refused = pool.compile([(SETTING, name) for name in ("good", "breaks", "struck", "hangs")])
    assert [bool(why) for why in refused] == [False, True, False, True]
    assert "took more than" in refused[3]
    assert not made[-1].lost
    # What ended is remembered; what did not has another go.
    count = len(made)
    assert pool.compile([(SETTING, name) for name in ("struck", "breaks", "good")])[::2] == ["", ""]
    assert len(made) == count
    assert pool.compile([(SETTING, "hangs")]) == refused[3:]
    assert len(made) == count + 1


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == 2
    assert "there is no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tune, "NODES", (64,))
    monkeypatch.setattr(tune, "GRID", {"num_warps": (2, 4, 8)})
    pool = tune.Pool(2)
    try:
        setting = Setting("graph_attention_forward", "tf32", 1)
        key = (setting.kernel, "tf32", 128, 1, launch.architecture(tune.torch.device("cuda")))
        constants, options = launch.configuration(*key)
        start = {**constants, **options}
        bench = tune.Bench(setting, pool)
        found, seconds, first = tune.search(start, tune.grid_of(start, "tf32"), bench.measure)
        assert seconds <= first < math.inf
        assert set(found) == set(start)
        # A tile that no GPU holds is passed over.
        assert bench.measure([start | {"BLOCK": 16384}]) == [math.inf]
    finally:
        pool.close()
