"""The search: it finds the best, begins with what tells most and stops in time."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.tune import __main__ as command
from benchmarks.tune import search
from benchmarks.tune.search import Setting
from ecore_kernels.triton_kernels import launch

GRID = {"BLOCK": (16, 32, 64), "STEP": (16, 32, 64), "RELOAD": (False, True), "num_warps": (4, 8)}
START = {"BLOCK": 16, "STEP": 16, "RELOAD": True, "num_warps": 4}


def test_search_finds_the_best():
    asked = []

    def measure(configurations):
        asked.extend(configurations)
        best = {"BLOCK": 64, "STEP": 32, "RELOAD": False, "num_warps": 4}
        return [1.0 + sum(c[name] != value for name, value in best.items()) for c in configurations]

    found, seconds, first = search.search(START, GRID, measure)
    assert found == {"BLOCK": 64, "STEP": 32, "RELOAD": False, "num_warps": 4}
    assert (seconds, first) == (1.0, 4.0)
    assert asked[0] == START
    assert len(asked) == len({json.dumps(c) for c in asked})  # nothing twice


def test_search_keeps_what_works():
    def measure(configurations):
        return [1.0 if c == START else math.inf if c["BLOCK"] == 64 else 0.99 for c in configurations]

    assert search.search(START, GRID, measure) == (START, 1.0, 1.0)  # one per cent is noise
    # From a configuration that does not run at all, anything that does is better.
    found, seconds, first = search.search(
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

    assert search.search(START, GRID, measure) == (START, 1.0, 1.0)
    rounds.clear()
    assert search.search(START, GRID, measure, others=(START, far)) == (far, 0.5, 1.0)
    assert rounds[:2] == [[START], [far, *search.variants(START, GRID)]]
    assert far not in rounds[2]


def test_the_most_informative_comes_first():
    """A budget may end before the rest."""
    settings = [
        Setting(f"{operator}_{direction}", arithmetic, depth)
        for arithmetic in ("ieee", "half", "tf32")
        for operator, depths in search.DEPTHS.items()
        for depth in depths
        for direction in ("forward", "backward")
    ]
    found = search.ordered(settings)
    assert sorted(map(str, found)) == sorted(map(str, settings))
    first = {(s.operator, s.depth, s.arithmetic) for s in found[: command.SETTINGS_AT_ONCE]}
    calls = (("graph_attention", 0), ("graph_attention", 1), ("edge_readout", 2))
    assert first == {(*call, arithmetic) for call in calls for arithmetic in ("half", "tf32")}
    assert {s.arithmetic for s in found[-16:]} == {"ieee"}


def test_search_stops_in_time():
    assert search.search(START, GRID, lambda many: [1.0] * len(many), lambda: False) == (START, 1.0, 1.0)


def test_every_constant_of_the_table_can_be_searched():
    for row in json.loads(launch.TABLE.read_text()):
        start = {**row["constants"], **{name: row[name] for name in search.OPTIONS}}
        grid = search.grid_of(start, row["arithmetic"])
        assert set(grid) == set(start), row
        if row["arithmetic"] == "ieee":
            assert max(v for name in ("BLOCK", "STEP") for v in grid.get(name, (0,))) <= 32


def test_larger_configurations_are_for_new_cards_alone():
    for (kernel, arithmetic), configurations in search.HOPPER.items():
        setting = Setting(kernel, arithmetic, max(search.DEPTHS[kernel.rpartition("_")[0]]))
        constants, options = launch.configuration(kernel, arithmetic, 128, setting.depth, 90)
        start = {**constants, **options}
        assert search.larger(setting, 89) == ()
        assert search.larger(setting, 90) == configurations
        assert search.first_round(setting, start, 90)[: len(configurations) + 1] == [start, *configurations]
        for configuration in configurations:
            assert list(configuration) == list(start)


@pytest.mark.timeout(1800)
def test_larger_configurations_compile_without_spills(tmp_path):
    """Unchanged kernels are not compiled again: the record of compiled kernels has their spills."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # From another cache the assembler would not report; line numbers change no program.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DISABLE_LINE_INFO": "1"}
    root = Path(search.__file__).parents[2]
    script = "import json\nfrom tests.kernels.triton import record\nprint(json.dumps(record.larger()[0]))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == sum(map(len, search.HOPPER.values())) > 0
    assert [row for row in found if row["problem"] or row["spills"]] == []
