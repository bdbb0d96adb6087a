"""Processes that compile."""

import pytest

pytest.importorskip("triton")

from benchmarks.tune import pool as pool_module
from benchmarks.tune.pool import Pool
from benchmarks.tune.search import Setting

SETTING = Setting("graph_attention_backward", "tf32", 1)


def test_pool_survives_hanging_and_lost_processes(monkeypatch):
    """A configuration that takes for ever, and one after which its process can use the GPU no more."""

    class Result:
        def __init__(self, value):
            self.value = value

        def get(self, timeout):
            if self.value is None:
                raise pool_module.multiprocessing.TimeoutError
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
    monkeypatch.setattr(pool_module.multiprocessing, "get_context", lambda _: context)
    pool = Pool(1)
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
