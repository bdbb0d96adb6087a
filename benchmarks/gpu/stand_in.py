"""A CPU that stands in for a GPU, at tiny sizes: the dress rehearsal's device.

    python -m benchmarks.gpu.stand_in MODULE [ARGUMENT ...]

runs a command of this project just as it is called on a GPU, ``--device cuda`` included: tensors that are meant for
the GPU are made on the CPU, the operators' reference stands in for the Triton kernels, and the work itself, done once
more, for a CUDA graph; nothing is compiled. No time and no error that comes out means anything. What a rehearsal
shows: every flag exists, everything imports, files are written where they are looked for, and no branch that only a
GPU takes fails for a silly reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import harness
from benchmarks.command_line import FUSED_BACKEND
from benchmarks.gpu.runner import Process, Session
from benchmarks.gpu.stages import Plan
from ecore.demo import sample_corpus
from ecore.training.cuda_graphs import Taken, Work

NODES = 40


def prepared(session: Session, plan: Plan) -> Plan:
    """The plan with what a rehearsal needs besides: a stand-in for compute-sanitizer, and data."""
    tools = session.scratch / "tools"
    tools.mkdir()
    # Its options have a value each; then comes what it watches.
    sanitizer = '#!/bin/sh\nwhile case "$1" in --*) ;; *) false ;; esac; do shift 2; done\nexec "$@"\n'
    (tools / "compute-sanitizer").write_text(sanitizer)
    (tools / "compute-sanitizer").chmod(0o755)
    path = os.pathsep.join([str(tools), session.environment["PATH"]])
    session.environment = {**session.environment, "PATH": path}
    if plan.data is not None:
        return plan
    data = session.scratch / "prepared"
    command = [sys.executable, "-m", "ecore", "prepare", "--data", str(sample_corpus()), "--out", str(data)]
    session.run(Process("prepare the sample corpus", [*command, "--vocabulary", "train"], 120.0))
    return dataclasses.replace(plan, data=data)


class _OnTheCpu(TorchFunctionMode):
    """Makes on the CPU whatever is asked for on a GPU."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.pin_memory:
            return args[0]
        return function(*map(_cpu, args), **{name: _cpu(value) for name, value in kwargs.items()})


def _cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class Recordings:
    """In place of CUDA graphs: the work once more."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def warm_up(self, work: Work) -> Taken:
        return work()

    def record(self, work: Work) -> Work:
        return work


class _Generator(torch.Generator):  # a class, because torch makes types of it
    def __new__(cls, device: Any = None) -> torch.Generator:  # type: ignore[misc]
        return _CpuGenerator()


_CpuGenerator = torch.Generator


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _replayed(call: Callable[[int], object], calls: int) -> Callable[[int], object]:
    def replay(number: int) -> None:
        for index in range(calls):
            call(index)

    return replay


def _device_functions() -> dict[str, Any]:
    """Stand-ins for functions of torch.cuda."""

    def returning(value: object) -> Callable[..., object]:
        """Return a new function each time: torch.compile's rules are by function, and two names may have two."""
        return lambda *_, **__: value

    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda *_: "a CPU",
        "get_device_capability": lambda *_: (8, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            name="a CPU", major=8, minor=0, total_memory=2**30, multi_processor_count=1
        ),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": returning(None),
        "synchronize": returning(None),
        "empty_cache": returning(None),
        "reset_peak_memory_stats": returning(None),
        "memory_allocated": returning(0),
        "max_memory_allocated": returning(0),
        "current_stream": lambda *_: _Stream(),
        "Stream": lambda *_: _Stream(),
        "stream": _nothing,
    }


class _Pool:
    """In place of processes that compile a kernel's configurations."""

    def __init__(self, processes: int, deadline: float = math.inf) -> None:
        pass

    def compile(self, jobs: Sequence[Any], seconds: float = math.inf) -> list[str]:
        return [""] * len(jobs)

    def close(self) -> None:
        pass


def stand_in(patches: contextlib.ExitStack) -> None:
    """Put everything in place, until ``patches`` is closed."""
    import ecore.config
    from benchmarks import (
        edge_options,
        otsu,
        recorded,
        sparse,
        step_operators,
        workload,
    )
    from benchmarks.generation import runner as generation_runner
    from benchmarks.operators import floors, plan, problems
    from benchmarks.operators import runner as operators_runner
    from benchmarks.training import __main__ as training
    from benchmarks.training import breakdown, steps
    from ecore.training import trainer

    def put(where: Any, name: str, what: Any) -> None:
        patches.enter_context(mock.patch.object(where, name, what))

    # What it makes for a CPU takes minutes, and says nothing of a GPU.
    put(torch, "compile", lambda model, **_: model)
    put(torch.compiler, "reset", lambda: None)
    for name, function in _device_functions().items():
        put(torch.cuda, name, function)
    # torch 2.15's optimizers ask the accelerator whether it records; a torch built for CUDA would start its driver.
    put(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    autocast = torch.autocast
    put(torch, "autocast", lambda kind, *args, **more: autocast("cpu", *args, **more))
    put(torch, "Generator", _Generator)
    profile = torch.profiler.profile
    on_the_cpu = [torch.profiler.ProfilerActivity.CPU]
    put(torch.profiler, "profile", lambda activities, **more: profile(activities=on_the_cpu, **more))
    patches.enter_context(_OnTheCpu())
    # Devices.
    put(harness, "replayed", _replayed)
    put(harness, "launches", lambda call: 1)
    put(steps, "CudaGraphs", Recordings)
    put(trainer, "recorder", lambda config, *_, **__: Recordings() if config.cuda_graphs else None)
    patches.enter_context(mock.patch.dict(FUSED_BACKEND, {"cuda": "reference"}))
    # Sizes.
    model, settings = ecore.config.PRESETS["tiny"]
    often = dataclasses.replace(settings, validate_every=20, checkpoint_every=20, log_every=10)
    small = dataclasses.replace(model, dim=24, feed_forward=32)
    patches.enter_context(mock.patch.dict(ecore.config.PRESETS, {"paper": (small, often)}))
    made = workload.workload
    for module in (training, recorded):
        put(module, "workload", lambda data, preset, number=6: made(data, preset, 4, min(number, 6)))
    put(workload, "WORDS", 300)
    put(workload, "CONTEXT_WORDS", 12)
    put(workload, "RESPONSE_WORDS", 6)
    patches.enter_context(mock.patch.dict(plan.NODES, {"cuda": (NODES,)}))
    put(operators_runner, "SECONDS_A_ROW", 0.01)
    put(operators_runner, "MEASUREMENTS", (2, 2))
    put(plan, "BATCH", 2)
    patches.enter_context(mock.patch.dict(problems.MOST_SETS, {"cuda": 2}))
    put(otsu, "ROWS", (16, 64))
    for name, small_sizes in {"WORDS": (4,), "VOCABULARY": 40, "WIDTH": 8, "ROWS": (4,)}.items():
        put(step_operators, name, small_sizes)
    put(sparse, "NODES", 20)
    put(sparse, "DEGREES", (3,))
    patches.enter_context(mock.patch.dict(edge_options.NODES, {"cuda": (12,)}))
    put(edge_options.Form, "flex", lambda form: form.formula)  # FlexAttention has no backward on a CPU
    put(breakdown, "PROFILED_STEPS", 1)
    put(breakdown, "SIZES", [(1, None), (2, 16)])
    for name, sizes in {"BATCHES": (1, 4), "CONTEXTS": (8, 16), "BEAMS": (1, 2), "SAID": (1, 5)}.items():
        put(generation_runner, name, sizes)
    put(generation_runner, "COMPARED", (1, 4))
    put(generation_runner, "WORDS_EACH", 6)
    put(floors, "ceilings", lambda device, precision: floors.Ceilings(1e9, 1e9))
    try:
        from benchmarks.tune import __main__ as tune
        from benchmarks.tune import search
    except ImportError:  # without Triton; then it is its command that fails
        return
    put(search, "NODES", (NODES,))
    put(search, "GRID", {"num_warps": (4, 8)})
    put(tune, "Pool", _Pool)


def main(argv: Sequence[str] | None = None) -> int:
    module, *arguments = sys.argv[1:] if argv is None else argv
    torch.set_num_threads(1)
    with contextlib.ExitStack() as patches:
        stand_in(patches)
        command = harness.command(module)
        with mock.patch.object(sys, "argv", [module, *arguments]):
            return command(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
