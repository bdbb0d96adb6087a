"""Measuring a setting: who is far behind, and what a launch takes for a configuration."""

import math

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.tune import search
from benchmarks.tune.bench import Bench
from benchmarks.tune.pool import Pool
from benchmarks.tune.search import Setting
from benchmarks.tune.trial import using
from ecore_kernels.triton_kernels import launch

FOUND = {"BLOCK": 7, "num_warps": 8, "num_stages": 2}


def test_the_far_behind_are_timed_on_one_input_alone(monkeypatch):
    bench = Bench.__new__(Bench)
    bench.setting, bench.inputs = Setting("graph_attention_backward", "tf32", 1), [1, 2, 3]
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


def test_a_kernel_is_launched_with_the_candidate():
    key = ("graph_attention_forward", "tf32", 128, 1, 80)
    before = launch.configuration(*key)
    with using("graph_attention_forward", FOUND):
        assert launch.configuration(*key) == ({"BLOCK": 7}, {"num_warps": 8, "num_stages": 2})
        other = launch.configuration("graph_attention_backward", *key[1:])
        assert other[0]["BLOCK"] != 7
    assert launch.configuration(*key) == before


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(search, "NODES", (64,))
    monkeypatch.setattr(search, "GRID", {"num_warps": (2, 4, 8)})
    pool = Pool(2)
    try:
        setting = Setting("graph_attention_forward", "tf32", 1)
        key = (setting.kernel, "tf32", 128, 1, launch.architecture(torch.device("cuda")))
        constants, options = launch.configuration(*key)
        start = {**constants, **options}
        bench = Bench(setting, pool)
        found, seconds, first = search.search(start, search.grid_of(start, "tf32"), bench.measure)
        assert seconds <= first < math.inf
        assert set(found) == set(start)
        # A tile that no GPU holds is passed over.
        assert bench.measure([start | {"BLOCK": 16384}]) == [math.inf]
    finally:
        pool.close()
