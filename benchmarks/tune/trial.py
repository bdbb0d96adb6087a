"""A kernel run once with a configuration of choice."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.operators import candidates, problems
from benchmarks.operators.problems import Problem
from benchmarks.tune.search import OPTIONS, Configuration, Setting


@contextlib.contextmanager
def using(kernel: str, configuration: Configuration) -> Iterator[None]:
    """Inside, that kernel is launched with this configuration; others as the table says."""
    from ecore_kernels.triton_kernels import launch

    from_table = launch.configuration

    def chosen(name: str, *key: Any) -> tuple[dict[str, Any], dict[str, int]]:
        if name != kernel:
            return from_table(name, *key)
        constants = {n: value for n, value in configuration.items() if n not in OPTIONS}
        return constants, {n: configuration[n] for n in OPTIONS}

    with mock.patch.object(launch, "configuration", chosen):
        yield


@functools.cache
def _first_inputs(problem: Problem) -> dict[str, Any]:
    return problems.draw(problem, 0, "cuda")


def try_once(setting: Setting, configuration: Configuration) -> str:
    """Compile a configuration, in a process of its own, by running it: the compiler's cache on disk then has it.

    Returns:
        why it failed, or "".
    """
    try:
        with using(setting.kernel, configuration):
            problem = setting.workloads()[0]
            problems.set_precision(problem.precision)
            tensors = _first_inputs(problem)
            candidate = candidates.build("fused", problem, "cuda", setting.backward)
            sent = problems.upstream(tensors)
            candidates.outputs_and_gradients(candidate, tensors, sent, setting.backward)
            torch.cuda.synchronize()
    except Exception as error:  # out of resources, or whatever else the compiler says
        return f"{type(error).__name__}: {error}"[:200]
    return ""
