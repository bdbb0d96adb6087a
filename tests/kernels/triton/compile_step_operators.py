"""Compile the kernels that have no launch table, without a GPU; run by test_step_operators.py.

Prints a line a kernel: name, type, architecture, registers, spilled bytes, shared bytes.
"""

from __future__ import annotations

import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

import ecore_kernels  # noqa: F401 (registers the operators)
from ecore_kernels.ahead_of_time.compiler import _assembler_report, source_of
from ecore_kernels.operators import registration
from ecore_kernels.triton_kernels import launch


def planned(kind: torch.dtype, architecture: int) -> list[launch.Launch]:
    """The launches of linear_cross_entropy and dropout_add_layer_norm at the paper's sizes, and of sparse_attention."""
    from ecore_kernels.label_smoothing import goal_of
    from ecore_kernels.triton_kernels.linear_cross_entropy.launcher import InTriton

    rows = torch.empty(800, 300, dtype=kind, device="meta")
    weight, seed = rows[0], torch.empty((), dtype=torch.int64, device="meta")
    logits = torch.empty(128, 23_714, dtype=kind, device="meta")
    exact = torch.promote_types(kind, torch.float32)
    goal = goal_of(23_714, 0.1, None, 0)
    with launch.plan(architecture) as launches:
        passes = InTriton()
        _, sums = passes.sums(logits, None, goal, exact)
        passes.errors(logits, sums, sums.maximum, torch.empty(128, 1, dtype=torch.int64, device="meta"), goal)
        name = "dropout_add_layer_norm"
        normed, total, saved = registration.compute(
            name, "forward", (rows, rows, weight, weight, seed, 0.2, 1e-5, "triton")
        )
        needs = [True] * 4
        registration.compute(
            name, "backward", (normed, total, total, saved, weight, seed, 0.2, needs, "triton")
        )
        sparse(kind, exact)
    return launches


def sparse(kind: torch.dtype, exact: torch.dtype) -> None:
    """Plan both directions of sparse_attention with everything that it takes, and all gradients."""
    count, heads, head = 40, 4, 100
    nodes = torch.empty(10, heads, head, dtype=kind, device="meta")
    vectors = torch.empty(count, heads, head, dtype=kind, device="meta")
    factor = torch.empty(count, heads, dtype=exact, device="meta")
    at, begin = (torch.empty(size, dtype=torch.int64, device="meta") for size in (count, 11))
    inputs = (*[nodes] * 3, factor, factor, *[vectors] * 3, at, at, begin, at, begin, at)
    output, weight = registration.compute("sparse_attention", "forward", (*inputs, 0.1, "triton"))
    registration.compute("sparse_attention", "backward", (output, *inputs, weight, 0.1, [True] * 8, "triton"))


def main() -> None:
    architectures = [int(argument) for argument in sys.argv[1:]]
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        for architecture in architectures:
            for launched in planned(kind, architecture):
                target = GPUTarget("cuda", architecture, 32)
                made = triton.compile(source_of(launched), target=target, options=launched.options)
                said = _assembler_report(made.asm["ptx"], architecture, launched.options)
                registers = re.search(r"Used (\d+) registers", said)
                spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
                print(
                    launched.kernel.__name__,
                    str(kind).removeprefix("torch."),
                    architecture,
                    registers[1] if registers else "?",
                    spills,
                    made.metadata.shared,
                )


if __name__ == "__main__":
    main()
