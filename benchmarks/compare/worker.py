"""One side of a comparison: a process that measures the commit on its path, a line of JSON at a time.

``python worker.py DEVICE SECONDS`` reads ``{"case", "first", "calls"}`` from its input and answers ``{"seconds"}``,
the mean of so many calls. Without ``calls`` it makes the case ready and answers ``{"calls", "inputs"}``: calls that
take about SECONDS, and a digest of the inputs, which has to be the same on both sides. What fails is
answered as ``{"refused"}``. The same file runs on both sides: it takes from a commit what is public, but for the
training step, which is the commit's own in ``benchmarks.training``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[int], object]
Case = Callable[[str], tuple[Call, str]]
"""From a device, what to call with a running number, and the digest of the inputs."""

BATCH, RESOLUTIONS, WORDS, EMOTIONS, DIM = 16, 3, 128, 32, 100
VOCABULARY, WIDTH = 23_714, 300
STEP_BATCHES = 6


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a short hash of the tensors' values."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().numpy().tobytes())
    return whole.hexdigest()[:16]


class Drawn:
    """Random inputs of one case; ``leaves`` get gradients."""

    def __init__(self, device: str) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)
        self.leaves: list[Tensor] = []
        self.others: list[Tensor] = []

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = scale * torch.randn(shape, generator=self.generator)
        self.leaves.append(drawn.to(self.device).requires_grad_())
        return self.leaves[-1]

    def constant(self, value: Tensor) -> Tensor:
        self.others.append(value.to(self.device))
        return self.others[-1]

    def step(self, operation: Callable[[], Any]) -> tuple[Call, str]:
        """Forward, and backward from gradients of ones."""

        def call(_: int) -> object:
            outputs = operation()
            outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]
            outputs = [x for x in outputs if x.requires_grad]
            sent = [torch.ones_like(x) for x in outputs]
            return torch.autograd.grad(outputs, self.leaves, sent, allow_unused=True)

        return call, digest([*self.leaves, *self.others])


def otsu(device: str) -> tuple[Call, str]:
    import ecore_kernels

    drawn = Drawn(device)
    values = drawn.constant(torch.randn(4096, EMOTIONS, generator=drawn.generator))
    return lambda _: ecore_kernels.otsu(values), digest([values])


def _graph(drawn: Drawn) -> Any:
    import ecore_kernels

    intensity = drawn.constant(0.01 + 0.24 * torch.rand(BATCH, WORDS, generator=drawn.generator))
    lengths = torch.linspace(WORDS / 4, WORDS, BATCH).long().to(drawn.device)
    emotion_weight = drawn.leaf(BATCH, EMOTIONS)
    correlation = drawn.leaf(EMOTIONS, EMOTIONS)
    return ecore_kernels.EmotionGraph.from_intensity(
        intensity, lengths, (0.0, 0.075, 0.15), correlation, emotion_weight
    )


def _nodes(drawn: Drawn, count: int) -> list[Tensor]:
    return [drawn.leaf(BATCH, RESOLUTIONS, WORDS + EMOTIONS, DIM) for _ in range(count)]


def _update(drawn: Drawn) -> Any:
    import ecore_kernels

    query, key = _nodes(drawn, 2)
    return ecore_kernels.EdgeUpdate(
        query, key, drawn.leaf(BATCH, RESOLUTIONS, WORDS + EMOTIONS), drawn.leaf()
    )


def graph_attention(device: str) -> tuple[Call, str]:
    import ecore_kernels

    drawn = Drawn(device)
    graph, history = _graph(drawn), [_update(drawn)]
    query, key, value = _nodes(drawn, 3)
    return drawn.step(
        lambda: ecore_kernels.graph_attention(query, key, value, graph, history, scale=DIM**-0.5)
    )


def edge_readout(device: str) -> tuple[Call, str]:
    import ecore_kernels

    drawn = Drawn(device)
    graph, history = _graph(drawn), [_update(drawn), _update(drawn)]
    return drawn.step(lambda: ecore_kernels.edge_readout(graph, history, scale=DIM**-0.5))


def edge_attention(device: str) -> tuple[Call, str]:
    import ecore_kernels

    drawn = Drawn(device)
    nodes = WORDS + EMOTIONS
    query, key, value = _nodes(drawn, 3)
    edge = drawn.leaf(BATCH, RESOLUTIONS, nodes, nodes)
    near = drawn.constant(torch.rand(BATCH, RESOLUTIONS, nodes, nodes, generator=drawn.generator) < 0.5)
    gate, factor = drawn.leaf(BATCH, RESOLUTIONS, nodes), drawn.leaf()
    return drawn.step(
        lambda: ecore_kernels.edge_attention(
            query, key, value, edge, near, gate=gate, edge_scale=factor, scale=DIM**-0.5
        )
    )


def sparse_attention(device: str) -> tuple[Call, str]:
    import ecore_kernels

    drawn = Drawn(device)
    nodes, degree, heads, dim = 4000, 8, 4, 32
    index = drawn.constant(torch.randint(nodes, (2, nodes * degree), generator=drawn.generator))
    edges = ecore_kernels.EdgeList.from_edge_index(index, nodes)
    query, key, value = (drawn.leaf(nodes, heads, dim) for _ in range(3))
    return drawn.step(lambda: ecore_kernels.sparse_attention(query, key, value, edges, scale=None))


def linear_cross_entropy(device: str) -> tuple[Call, str]:
    import ecore_kernels

    drawn = Drawn(device)
    hidden, weight = drawn.leaf(352, WIDTH), drawn.leaf(VOCABULARY, WIDTH, scale=WIDTH**-0.5)
    bias = drawn.leaf(VOCABULARY)
    target = drawn.constant(torch.randint(VOCABULARY, (352,), generator=drawn.generator))
    return drawn.step(
        lambda: ecore_kernels.linear_cross_entropy(hidden, weight, bias, target, label_smoothing=0.1)
    )


def dropout_add_layer_norm(device: str) -> tuple[Call, str]:
    import ecore_kernels

    drawn = Drawn(device)
    x, residual, weight, bias = (
        drawn.leaf(6400, WIDTH),
        drawn.leaf(6400, WIDTH),
        drawn.leaf(WIDTH),
        drawn.leaf(WIDTH),
    )
    return drawn.step(lambda: ecore_kernels.dropout_add_layer_norm(x, residual, weight, bias, 0.2, seed=7))


def varlen_attention(device: str) -> tuple[Call, str]:
    import ecore_kernels

    drawn = Drawn(device)
    offsets = torch.cat(
        [torch.zeros(1), torch.rand(63, generator=drawn.generator).sort().values, torch.ones(1)]
    )
    offsets = drawn.constant((1408 * offsets).long())  # of 64 responses
    rows = drawn.leaf(1408, 3, 2, 20)
    sequences = ecore_kernels.Sequences.from_offsets(offsets)
    return drawn.step(lambda: ecore_kernels.varlen_attention(rows, None, None, sequences, causal=True))


def training_step(preset: str) -> Case:
    """A step with everything that the commit has, on made-up batches, one after the other."""

    def case(device: str) -> tuple[Call, str]:
        from benchmarks.training.steps import WITHOUT, Steps
        from benchmarks.workload import workload

        work = workload(None, preset, number=STEP_BATCHES)
        steps = Steps(work, list(WITHOUT), device)
        for number in range(STEP_BATCHES):
            steps.take_number(number)
        # What every commit's batches have; a commit may add parts of its own.
        inputs = [
            getattr(batch, name) for batch, _ in work.batches for name in ("context", "lengths", "response")
        ]
        return steps.take_number, digest(inputs)

    return case


CASES: dict[str, Case] = {
    "otsu": otsu,
    "graph_attention": graph_attention,
    "edge_readout": edge_readout,
    "edge_attention": edge_attention,
    "sparse_attention": sparse_attention,
    "linear_cross_entropy": linear_cross_entropy,
    "dropout_add_layer_norm": dropout_add_layer_norm,
    "varlen_attention": varlen_attention,
    "step-released": training_step("released"),
    "step-paper": training_step("paper"),
}
"""Operators forward and backward, and training steps by preset, in the order of measuring."""


class Side:
    """The cases of this process: one is ready at a time."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.ready: tuple[str, Call] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            name = request["case"]
            if "calls" not in request:
                return self._make_ready(name)
            assert self.ready is not None, "a case is made ready first"
            return {"seconds": self._measure(self.ready[1], request["first"], request["calls"])}
        except Exception as error:  # the other cases are still measured
            self.ready = None
            return {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:300]}

    def _make_ready(self, name: str) -> dict[str, Any]:
        self.ready = None  # frees the case before
        call, inputs = CASES[name](self.device)
        self.ready = name, call
        for number in range(2):
            call(number)
        pace = self._measure(call, 0, 2)
        return {"calls": max(1, round(self.seconds / pace)), "inputs": inputs}

    def _measure(self, call: Call, first: int, calls: int) -> float:
        self._wait()
        begin = time.perf_counter()
        for number in range(first, first + calls):
            call(number)
        self._wait()
        return (time.perf_counter() - begin) / calls

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    device, seconds = sys.argv[1], float(sys.argv[2])
    # The pipe is for answers alone: whatever else prints goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import ecore_kernels
    from ecore_kernels import native

    backends = [name for name in ecore_kernels.available_backends() if name != "reference"]
    record = {"package": ecore_kernels.__file__, "backends": backends, "native": native.unavailable_reason()}
    torch.empty(31 * 2**20, dtype=torch.uint8)  # glibc keeps freed memory from here on
    side = Side(device, seconds)
    print(json.dumps(record), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(side.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
