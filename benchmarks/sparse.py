"""Attention on sparse graphs: the fused kernels and the gather-scatter formulation, eager and compiled.

    python -m benchmarks.sparse [--device cpu|cuda] [--nodes 10000] [--out FILE.json]

Random graphs of 10,000 nodes by average degree, with 4 heads of 32, and with edge vectors on key and value where said
(as PyTorch Geometric's ``TransformerConv``). A time is a forward and a backward to all inputs, in float32: in C++ on a
CPU, in Triton on a GPU. The rivals run in turn with the fused kernels in one process; memory is the peak of PyTorch's
allocator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.command_line import FUSED_BACKEND, need_fused, parser_of
from ecore_kernels import EdgeList, sparse_attention

NODES = 10_000
DEGREES = (8, 16, 32)
HEADS, DIM = 4, 32


def gather_scatter(
    query: Tensor, key: Tensor, value: Tensor, edges: EdgeList, bias: Tensor, vector: Tensor | None
) -> Tensor:
    """The same attention as message-passing libraries write it: edge by edge, sums by ``index_add``."""
    keys, values = key[edges.sender], value[edges.sender]  # [E, H, d]
    if vector is not None:
        keys, values = keys + vector, values + vector
    score = DIM**-0.5 * (query[edges.receiver] * keys).sum(-1) + bias  # [E, H]
    to = edges.receiver[:, None].expand_as(score)
    highest = score.new_full(query.shape[:2], -torch.inf).scatter_reduce(0, to, score.detach(), "amax")
    weight = (score - highest[edges.receiver]).exp()
    total = torch.zeros_like(highest).index_add(0, edges.receiver, weight)
    weight = weight / total[edges.receiver]
    return torch.zeros_like(query).index_add(0, edges.receiver, weight[:, :, None] * values)


def fused(
    query: Tensor, key: Tensor, value: Tensor, edges: EdgeList, bias: Tensor, vector: Tensor | None
) -> Tensor:
    return sparse_attention(
        query,
        key,
        value,
        edges,
        bias=bias,
        key_offset=vector,
        value_offset=vector,
        scale=None,
        backend=FUSED_BACKEND[query.device.type],
    )


def problem(nodes: int, degree: int, vectors: bool, device: str) -> tuple[Any, list[Tensor]]:
    """A random graph, every node with an edge to itself, and its tensors: query, key, value, bias and edge vectors."""
    generator = torch.Generator().manual_seed(degree)
    drawn = torch.randint(nodes, (2, nodes * (degree - 1)), generator=generator)
    edges = EdgeList.from_edge_index(torch.cat([torch.arange(nodes).expand(2, -1), drawn], 1), nodes)
    shapes = [(nodes, HEADS, DIM)] * 3 + [(len(edges), HEADS)] + [(len(edges), HEADS, DIM)] * vectors
    leaves = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    return edges.to(device), leaves


def both_ways(edges: EdgeList, leaves: list[Tensor], upstream: Tensor, attend: Callable[..., Tensor]) -> Any:
    """The output and all gradients."""
    query, key, value, bias, *vector = leaves
    output = attend(query, key, value, edges, bias, vector[0] if vector else None)
    return output.detach(), torch.autograd.grad(output, leaves, upstream)


def timed(step: Callable[..., Any], attend: Callable[..., Tensor]) -> Callable[[int], object]:
    return lambda _: step(attend)


def run(nodes: int, device: str, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One result a graph, each as soon as it is there; ``left_out`` gets why rivals are missing."""
    for vectors in (False, True):
        for degree in DEGREES:
            edges, leaves = problem(nodes, degree, vectors, device)
            upstream = torch.randn(nodes, HEADS, DIM).to(device)
            step = functools.partial(both_ways, edges, leaves, upstream)
            calls: dict[str, Callable[[int], object]] = {
                "fused": timed(step, fused),
                "eager": timed(step, gather_scatter),
            }
            compiled = torch.compile(gather_scatter)
            try:
                step(compiled)
            except Exception as error:  # no compiler, or what Inductor cannot do
                left_out["compiled"] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                calls["compiled"] = timed(step, compiled)
            check(step(fused), step(gather_scatter))
            timings = harness.interleaved(calls, device=device, measurements=9)
            memory = {name: harness.peak_memory(call, device) for name, call in calls.items()}
            result = {
                "device": device,
                "nodes": nodes,
                "degree": degree,
                "edges": len(edges),
                "vectors": vectors,
                "threads": torch.get_num_threads(),
                "timings": timings,
                "memory": memory,
            }
            if device == "cuda":
                result["replayed"] = harness.replays(calls, left_out, measurements=9)
            yield result


def check(ours: Any, theirs: Any) -> None:
    """A timing counts only for a right answer."""
    for got, expected in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def report(results: Sequence[dict[str, Any]]) -> str:
    """A table, a line a graph: the fused time, the rivals' times over it, and memory."""
    names = [name for name in ("eager", "compiled") if all(name in r["timings"] for r in results)]
    header = ["degree", "edge vectors", "fused", *(f"{n} / fused" for n in names), "memory", "eager / fused"]
    rows = []
    for r in results:
        timings = harness.best_timings(r)
        ours = timings["fused"].median
        rows.append(
            [
                str(r["degree"]),
                "yes" if r["vectors"] else "no",
                harness.duration(ours),
                *(f"{timings[name].median / ours:.2f}" if name in timings else "" for name in names),
                harness.memory(r["memory"]["fused"]),
                f"{r['memory']['eager'] / r['memory']['fused']:.1f}" if r["memory"]["fused"] else "",
            ]
        )
    return harness.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("benchmarks.sparse", __doc__)
    parser.add_argument("--device", choices=tuple(FUSED_BACKEND), default="cpu")
    parser.add_argument("--nodes", type=int, default=NODES, help="of a graph (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args(argv)
    if arguments.nodes < 1:
        parser.exit(2, f"sparse: --nodes: expected at least 1, got {arguments.nodes}\n")
    need_fused(parser, "sparse", arguments.device, "sparse_attention")
    harness.keep_freed_memory()
    left_out: dict[str, str] = {}
    results = harness.collect("sparse", run(arguments.nodes, arguments.device, left_out), arguments.out)
    print(report(results))
    harness.fail_for(left_out)


if __name__ == "__main__":
    main()
