"""Errors of a backend over those of plain PyTorch in the same type, where softmaxes saturate."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from ecore_kernels import (
    EdgeUpdate,
    EmotionGraph,
    Sequences,
    edge_attention,
    graph_attention,
    use_backend,
    varlen_attention,
)

DRAWS = 9  # single draws of plain float32, computed in two orders, reach a ratio of 24
LARGEST = (1.0, 10.0, 100.0, 800.0, 8e3, 1e5)
# Name and layers of history of graph_attention; edge_attention without and with updated edges.
CASES = {"depth 0": 0, "depth 1": 1, "depth 2": 2, "edge": None, "edge, updated": None}

SEQUENCES = ("sequences", "sequences, causal")
"""Cases of varlen_attention, which has no Triton kernel."""

Leaves = dict[str, Tensor]


def ratios(
    case: str,
    largest: float,
    backend: str,
    *,
    kind: torch.dtype = torch.float32,
    draws: int = DRAWS,
    batch: int = 1,
    resolutions: int = 2,
    words: int = 24,
    emotions: int = 8,
    dim: int = 100,
    device: str = "cpu",
) -> dict[str, float]:
    """Return, for outputs and every gradient, the median over draws of the error over plain PyTorch's.

    Both errors are against float64, on the same inputs of type ``kind``; of the largest difference and the norm of all
    the worse ratio counts. Queries are scaled so that the largest ``|x|`` among neighbours is ``largest``.
    """
    found: dict[str, list[float]] = {}
    for seed in range(draws):
        torch.manual_seed(1000 + seed)
        run, leaves, weights = _problem(case, largest, (batch, resolutions, words, emotions, dim))
        leaves = {name: x.to(kind) for name, x in leaves.items()}
        exact = _results(run, leaves, weights, "reference", torch.float64, "cpu")
        plain = _results(run, leaves, weights, "reference", kind, "cpu")
        fused = _results(run, leaves, weights, backend, kind, device)
        for name, truth in exact.items():
            one, other = fused[name] - truth, plain[name] - truth
            # Gradients of wholly saturated rows can be 0, as all errors then should be.
            rounding = torch.finfo(kind).eps / 16 * torch.stack([truth.abs().max(), truth.norm()])
            rounding = rounding.clamp(min=torch.finfo(kind).tiny)
            errors = torch.stack([one.abs().max(), one.norm()])
            allowed = torch.stack([other.abs().max(), other.norm()])
            found.setdefault(name, []).append(float((errors / torch.maximum(allowed, rounding)).max()))
    return {name: statistics.median(values) for name, values in found.items()}


def _problem(
    case: str, largest: float, sizes: tuple[int, int, int, int, int]
) -> tuple[Callable[..., list[Tensor]], Leaves, list[Tensor]]:
    """A function of the leaves and a type, the leaves, and random weights on what it returns, in float64."""
    batch, resolutions, words, emotions, dim = sizes
    if case in SEQUENCES:
        return _sequences(case == SEQUENCES[1], largest, batch * (words + emotions), resolutions, dim)
    lead = (batch, resolutions, words + emotions)
    scale = dim**-0.5
    mask = torch.rand(batch, resolutions, words) > 0.3
    word_weight = torch.rand(batch, words, dtype=torch.float64).float().double()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    leaves = {name: normal(*lead, dim) for name in ("query", "key", "value")}
    leaves["emotion_weight"] = torch.rand(batch, emotions, dtype=torch.float64)
    leaves["correlation"] = normal(emotions, emotions).softmax(-1)
    depth = CASES[case]
    for m in range(depth or 0):
        leaves |= {
            f"query {m}": normal(*lead, dim),
            f"key {m}": normal(*lead, dim),
            f"gate {m}": normal(*lead),
        }

    def graph_of(of: Leaves) -> EmotionGraph:
        return EmotionGraph(
            word_weight.to(of["correlation"]),
            mask.to(of["correlation"].device),
            of["emotion_weight"],
            of["correlation"],
        )

    edge, neighbors = graph_of(leaves).dense()
    for m in range(depth or 0):
        edge = (
            edge * (1 + scale * leaves[f"query {m}"] @ leaves[f"key {m}"].mT) * leaves[f"gate {m}"][..., None]
        )
    if depth is None:
        edge = torch.rand_like(edge) + 0.5
    x = (scale * leaves["query"] @ leaves["key"].mT * edge)[neighbors]
    leaves["query"] *= largest / x.abs().max()
    updated = case == "edge, updated"
    if depth is None:
        del leaves["emotion_weight"], leaves["correlation"]
        leaves |= {"edge": edge} | ({"gate": normal(*lead)} if updated else {})

    def run(of: Leaves) -> list[Tensor]:
        nodes = of["query"], of["key"], of["value"]
        if depth is None:
            options = {"gate": of["gate"], "edge_scale": 0.7} if updated else {}
            among = neighbors.to(nodes[0].device)
            results = edge_attention(*nodes, of["edge"], among, scale=scale, **options)
            return list(results) if updated else [results[0]]
        history = [EdgeUpdate(of[f"query {m}"], of[f"key {m}"], of[f"gate {m}"], of["gate 0"].new_ones(()))
                   for m in range(depth)]  # fmt: skip
        return [graph_attention(*nodes, graph_of(of), history, scale=scale)]

    weights = [normal(*lead, dim), *([normal(*lead, lead[2])] if updated else [])]
    return run, leaves, weights


def _sequences(
    causal: bool, largest: float, rows: int, heads: int, dim: int
) -> tuple[Callable[..., list[Tensor]], Leaves, list[Tensor]]:
    """As :func:`_problem`: two sequences of ``rows`` rows in all, two thirds of them in the first."""
    first, scale = 2 * rows // 3, dim**-0.5
    sequences = Sequences.from_lengths([first, rows - first])
    leaves = {name: torch.randn(rows, heads, dim, dtype=torch.float64) for name in ("query", "key", "value")}
    of_sequences = (
        scale * torch.einsum("ihd,jhd->hij", leaves["query"][part], leaves["key"][part])
        for part in (slice(first), slice(first, None))
    )
    leaves["query"] *= largest / max(float((x.tril() if causal else x).abs().max()) for x in of_sequences)

    def run(of: Leaves) -> list[Tensor]:
        nodes = of["query"], of["key"], of["value"]
        return [varlen_attention(*nodes, sequences.to(nodes[0].device), causal=causal, scale=scale)]

    return run, leaves, [torch.randn(rows, heads, dim, dtype=torch.float64)]


def _results(
    run: Callable[[Leaves], list[Tensor]],
    leaves: Leaves,
    weights: list[Tensor],
    backend: str,
    kind: torch.dtype,
    device: str,
) -> dict[str, Tensor]:
    """Outputs and the leaves' gradients, computed by a backend in a type, in float64."""
    here = {name: x.to(device, kind).requires_grad_() for name, x in leaves.items()}
    with use_backend(backend):
        outputs = run(here)
        gradients = torch.autograd.grad(
            outputs, list(here.values()), [w.float().to(outputs[0]) for w in weights]
        )
    named = {"output": outputs[0]} | ({"new_edge": outputs[1]} if len(outputs) > 1 else {})
    named |= {f"d {name}": gradient for name, gradient in zip(here, gradients, strict=True)}
    return {name: x.detach().cpu().double() for name, x in named.items()}


def table(backend: str, *, draws: int = DRAWS, **sizes: int) -> str:
    """The worst median of every case and ``|x|``, with the tensor it is of."""
    lines = ["| case | " + " | ".join(f"{x:g}" for x in LARGEST) + " |", "| --- |" + " ---: |" * len(LARGEST)]
    for case in (*CASES, *SEQUENCES) if backend == "native" else CASES:
        cells = []
        for largest in LARGEST:
            found = ratios(case, largest, backend, draws=draws, **sizes)
            worst = max(found, key=lambda name: found[name])
            cells.append(f"{found[worst]:.3g} ({worst})")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    print(table(sys.argv[1] if len(sys.argv) > 1 else "native"))
