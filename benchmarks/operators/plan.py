"""The order of measuring: problems and directions, the most telling first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.operators import problems
from benchmarks.operators.problems import Problem

# In the order in which a budget of time is spent on them.
NODES = {"cuda": (160, 288, 96, 4096, 16384, 64, 1024, 2048), "cpu": (96, 160, 288, 64, 1024)}
PRECISIONS = {"cuda": ("tf32", "bfloat16", "ieee"), "cpu": ("ieee",)}
DEPTHS = {"graph_attention": (1,), "edge_readout": (2,), "edge_attention": (1, 0)}
BATCH, SINGLE_FROM = 16, 2048


def plan(
    device: str,
    operators: Sequence[str],
    nodes: Sequence[int] | None,
    precisions: Sequence[str] | None,
    depths: Sequence[int] | None,
) -> list[tuple[Problem, str]]:
    """Problems (masks aside) and directions, the most telling first, for a budget may end before the rest.

    First comes graph_attention, forward and backward, at the sizes that dialogues have; then larger and smaller
    sizes, the other operators and the forward pass alone take turns; all of ieee comes last.
    """
    found = []
    sizes, kinds = nodes or NODES[device], precisions or PRECISIONS[device]
    for operator in operators:
        wanted = DEPTHS[operator]
        if depths is not None and operator != "edge_attention":
            wanted = tuple(d for d in depths if d or operator != "edge_readout") or wanted
        for size, kind, depth in itertools.product(sizes, kinds, wanted):
            batch = 1 if size >= SINGLE_FROM else BATCH
            problem = Problem(operator, size, batch=batch, depth=depth, precision=kind)
            for direction in problems.DIRECTIONS:
                forward = direction == "forward"
                turn = sizes.index(size) + 2 * operators.index(operator) + 2 * forward
                rank = (kind == "ieee", turn, operators.index(operator), forward, kinds.index(kind))
                found.append((rank, problem, direction))
    return [(problem, direction) for _, problem, direction in sorted(found, key=lambda entry: entry[0])]
