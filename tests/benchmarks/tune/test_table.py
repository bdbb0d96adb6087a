"""The launch table, rewritten: only what was measured changes."""

import json

import pytest

pytest.importorskip("triton")

from benchmarks.tune import table
from benchmarks.tune.search import OPTIONS, Setting
from ecore_kernels.triton_kernels import launch

SETTING = Setting("graph_attention_backward", "tf32", 1)
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


def test_unchanged_table_is_the_same_bytes():
    written = launch.TABLE.read_text()
    rows = json.loads(written)
    assert table.text(rows) == written
    row = rows[0]
    same = {**row["constants"], **{name: row[name] for name in OPTIONS}}
    setting = Setting(row["kernel"], row["arithmetic"], row["depth"])
    again = table.rewritten(rows, setting, row["head"], row["architecture"], same)
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, rows))


@pytest.fixture
def lookup(monkeypatch, tmp_path):
    """Rows to a function that looks them up as a launch would."""

    def table_of(rows):
        path = tmp_path / "table.json"
        path.write_text(table.text(rows))
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
    rows = table.rewritten(ROWS, setting, 128, architecture, FOUND)
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
    twice = table.rewritten(rows, setting, 128, architecture, FOUND | {"BLOCK": 9})
    assert len(twice) == len(rows)
    assert lookup(twice)(setting.kernel, "tf32", 128, depth, architecture)[0] == {"BLOCK": 9}


def test_rows_keep_the_tables_order():
    rows = table.rewritten(ROWS, SETTING, 128, 90, FOUND)
    order = [(r["kernel"], r["arithmetic"], r["depth"], r["architecture"]) for r in rows]
    assert order[:6] == [(r["kernel"], r["arithmetic"], r["depth"], r["architecture"]) for r in ROWS[:6]]
    assert order[6:] == [
        ("graph_attention_backward", "tf32", depth, card)
        for depth, card in ((0, 80), (0, 89), (1, 80), (1, 89), (1, 90))
    ]
    lines = table.text(rows).splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("[", "]", len(rows) + 2)
