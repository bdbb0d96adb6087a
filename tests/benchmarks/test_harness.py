"""The timing that every benchmark shares."""

import json
import time

import pytest

from benchmarks import harness


def test_interleaved_times_each_candidate_in_turn():
    order = []

    def call(name, seconds):
        def timed(number):
            order.append((name, number))
            time.sleep(seconds)

        return timed

    timings = harness.interleaved(
        {"short": call("short", 0.001), "long": call("long", 0.004)}, measurements=5, seconds_each=0.0
    )
    for name, seconds in (("short", 0.001), ("long", 0.004)):
        timing = timings[name]
        assert seconds <= timing.minimum <= timing.p20 <= timing.median <= timing.p80
        assert (timing.measurements, timing.calls) == (5, 1)
    # After the warm-up, strictly one after the other, each with its own running number.
    assert order[-10:] == [(name, number) for number in range(5) for name in ("short", "long")]


def test_the_minimum_is_the_quickest_measurement():
    seconds = iter([0.0] * 5 + [0.02, 0.001, 0.01])
    timing = harness.interleaved(
        {"uneven": lambda number: time.sleep(next(seconds))}, measurements=3, seconds_each=0.0
    )["uneven"]
    assert 0.001 <= timing.minimum < timing.p20 < 0.01 <= timing.median < 0.02


def test_quick_calls_are_repeated():
    timing = harness.interleaved({"nothing": lambda number: None}, measurements=3, seconds_each=0.001)[
        "nothing"
    ]
    assert timing.calls > 100
    assert timing.median < 1e-4


@pytest.mark.parametrize(
    "seconds, text", [(2.5, "2.5 s"), (0.00325, "3.25 ms"), (1.58e-5, "15.8 µs"), (3e-8, "0.03 µs")]
)
def test_duration(seconds, text):
    assert harness.duration(seconds) == text


def test_table_is_markdown():
    lines = harness.table(["rows", "time"], [["16", "1 ms"], ["65,536", "12 ms"]]).splitlines()
    assert lines == ["|   rows |  time |", "|-------:|------:|", "|     16 |  1 ms |", "| 65,536 | 12 ms |"]


def test_results_name_the_machine(tmp_path):
    timing = harness.Timing(0.25, 1.0, 0.5, 2.0, 3, 4)
    harness.write_json(
        tmp_path / "new" / "result.json", "otsu", [{"rows": 16, "timings": {"native": timing}}]
    )
    document = json.loads((tmp_path / "new" / "result.json").read_text())
    assert document["benchmark"] == "otsu"
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["packages"]["torch"]
    assert document["results"][0]["timings"]["native"]["median"] == 1.0


def test_a_table_shows_replayed_calls_where_its_measure_was_recorded():
    timings = {"fused": 3.0, "eager": 6.0}
    assert harness.best_timings({"timings": timings}) == timings
    assert harness.best_timings({"timings": timings, "replayed": {"eager": 1.0}}) == timings
    assert harness.best_timings({"timings": timings, "replayed": {"fused": 1.0}}) == {"fused": 1.0}


def test_a_candidate_that_cannot_be_recorded_is_named(monkeypatch):
    def replayed(call, calls):
        if call is slow:
            raise RuntimeError("no graph\nand more")
        return call

    def quick(number):
        return number

    def slow(number):
        return number

    monkeypatch.setattr(harness, "replayed", replayed)
    measured = harness.Timing(8.0, 16.0, 8.0, 24.0, 3, 1)
    monkeypatch.setattr(harness, "interleaved", lambda calls, **_: dict.fromkeys(calls, measured))
    left_out = {}
    timings = harness.replays({"fused": quick, "eager": slow}, left_out, measurements=3)
    assert timings == {"fused": harness.Timing(1.0, 2.0, 1.0, 3.0, 3, 1)}  # a graph holds eight calls
    assert left_out == {"eager, replayed": "RuntimeError: no graph"}
