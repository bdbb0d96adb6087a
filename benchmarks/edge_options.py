"""``edge_attention`` as published layers call it, against what they use now: eager, compiled, SDPA, FlexAttention.

    python -m benchmarks.edge_options [--device cpu|cuda] [--nodes 64 256 1024] [--precision ieee] [--out FILE.json]

Complete graphs, in batches of 4, with 8 heads of 32; every edge or bias needs a gradient. A time is a forward and a
backward to all inputs, on a GPU replayed from a CUDA graph, in the table, and one call at a time, in the file. On a CPU
all is float32; on a GPU ``--precision`` chooses, by default tf32 and bfloat16. The forms:

* ``edge``: scores multiplied by edges (DGL's BiasedMHA "mul");
* ``bias``: edges added to scores (BiasedMHA "add", Graphormer);
* ``edge, update``: the weighted scores are returned as the next layer's edges, too (EGT, the E-CORE release);
* ``bias, dropout``: a tenth of the weights dropped;
* ``bias, shared keys``: 8 heads of the query share 2 of key and value.

``eager`` is the formula in PyTorch, ``compiled`` the same under torch.compile at static shapes. ``sdpa`` is
``scaled_dot_product_attention`` with the bias as its mask, ``flex`` is FlexAttention, compiled: neither returns scores,
SDPA multiplies by no edge, and FlexAttention has no backward on a CPU and no dropout. ``products`` is what nobody can
save: the six matrix products of both directions alone, by torch, into memory that is there. All run in turn in one
process, and a fused answer counts only where it is that of the formula.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.command_line import FUSED_BACKEND, need_fused, parser_of
from ecore_kernels import edge_attention
from ecore_kernels.problems import set_precision

NODES = {"cpu": (64, 256, 1024), "cuda": (256,)}  # on a GPU each size is compiled for a minute
PRECISIONS = {"cpu": ("ieee",), "cuda": ("tf32", "bfloat16")}
BATCH, HEADS, SHARED, DIM = 4, 8, 2, 32
SCALE = DIM**-0.5
NAMES = ("fused", "eager", "compiled", "sdpa", "flex", "products")


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to call the operator.

    Attributes:
        name: of the table's row.
        multiplies: the edges multiply the scores; else they are added.
        updates: weighted scores are returned.
        dropout: of the softmax's weights.
        key_heads: heads of key and value.
    """

    name: str
    multiplies: bool = False
    updates: bool = False
    dropout: float = 0.0
    key_heads: int = HEADS

    def fused(self, query: Tensor, key: Tensor, value: Tensor, edge: Tensor) -> tuple[Tensor, ...]:
        output, new_edge = edge_attention(
            query,
            key,
            value,
            edge if self.multiplies else None,
            bias=None if self.multiplies else edge,
            edge_scale=1.0 if self.updates else None,
            scale=SCALE,
            dropout=self.dropout,
            seed=1 if self.dropout else None,
            backend=FUSED_BACKEND[query.device.type],
        )
        return (output,) if new_edge is None else (output, new_edge)

    def formula(self, query: Tensor, key: Tensor, value: Tensor, edge: Tensor) -> tuple[Tensor, ...]:
        """The same in plain PyTorch, as published layers write it."""
        if self.key_heads != HEADS:
            key, value = (x.repeat_interleave(HEADS // self.key_heads, 1) for x in (key, value))
        score = SCALE * (query @ key.mT)  # [B, H, N, N]
        score = score * edge if self.multiplies else score + edge
        weight = score.softmax(-1)
        if self.dropout:
            weight = F.dropout(weight, self.dropout)
        return (weight @ value, edge + score) if self.updates else (weight @ value,)

    def sdpa(self, query: Tensor, key: Tensor, value: Tensor, edge: Tensor) -> tuple[Tensor, ...]:
        shared = self.key_heads != HEADS
        output = F.scaled_dot_product_attention(
            query, key, value, edge, self.dropout, scale=SCALE, enable_gqa=shared
        )
        return (output,)

    def flex(self) -> Callable[..., tuple[Tensor, ...]]:
        from torch.nn.attention.flex_attention import flex_attention

        def attend(query: Tensor, key: Tensor, value: Tensor, edge: Tensor) -> tuple[Tensor, ...]:
            def weigh(score: Tensor, batch: Tensor, head: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
                weight = edge[batch, head, receiver, sender]
                return score * weight if self.multiplies else score + weight

            shared = self.key_heads != HEADS
            return (flex_attention(query, key, value, score_mod=weigh, scale=SCALE, enable_gqa=shared),)

        return torch.compile(attend, fullgraph=True, dynamic=False)

    def rivals(self, device: str) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
        """Return the implementations to compare with, by name."""
        found: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            "eager": self.formula,
            "compiled": torch.compile(self.formula, fullgraph=True, dynamic=False),
        }
        if not self.multiplies:
            found["sdpa"] = self.sdpa
        if device == "cuda" and not self.updates and not self.dropout:
            found["flex"] = self.flex()
        return found


def products(leaves: Sequence[Tensor], sent: Sequence[Tensor]) -> Callable[[int], object]:
    """Return a call that computes the matrix products of a forward and backward, of any numbers in place of weights."""
    query, key, value, grad = (x.detach() for x in (*leaves[:3], sent[0]))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    query, key, value, grad = (x.flatten(0, 1) for x in (query, key, value, grad))  # [B * H, N, d]
    square, rows = query.new_empty(len(query), query.shape[1], key.shape[1]), torch.empty_like(query)

    def call(_: int) -> None:
        torch.bmm(query, key.mT, out=square)
        torch.bmm(square, value, out=rows)
        torch.bmm(grad, value.mT, out=square)
        torch.bmm(square.mT, grad, out=rows)
        torch.bmm(square, key, out=rows)
        torch.bmm(square.mT, query, out=rows)

    return call


FORMS = (
    Form("edge", multiplies=True),
    Form("bias"),
    Form("edge, update", multiplies=True, updates=True),
    Form("bias, dropout", dropout=0.1),
    Form("bias, shared keys", key_heads=SHARED),
)


def problem(
    form: Form, nodes: int, device: str, precision: str = "ieee"
) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key, value and edges; gradients of the outputs."""
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    generator = torch.Generator().manual_seed(nodes)
    query, keys, square = (
        (BATCH, HEADS, nodes, DIM),
        (BATCH, form.key_heads, nodes, DIM),
        (BATCH, HEADS, nodes, nodes),
    )
    leaves = [
        torch.randn(shape, generator=generator).to(device, kind) for shape in (query, keys, keys, square)
    ]
    sent = [torch.randn(shape, generator=generator).to(device, kind) for shape in (query, square)]
    return [leaf.requires_grad_() for leaf in leaves], sent[: 1 + form.updates]


def both_ways(
    attend: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], sent: list[Tensor]
) -> tuple[Tensor, ...]:
    """The outputs and all gradients."""
    outputs = attend(*leaves)
    return (*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, sent))


def timed(
    attend: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], sent: list[Tensor]
) -> Callable[[int], object]:
    return lambda _: both_ways(attend, leaves, sent)


def check(form: Form, leaves: list[Tensor], sent: list[Tensor]) -> None:
    """Compare the fused kernels with the formula in float64; with dropout, for which each draws its own mask, without.

    A timing counts only for a right answer: one whose largest error is within twice that of the formula in the same
    precision, or within 0.1 %.

    Raises:
        AssertionError: the fused answer is another.
    """
    without = dataclasses.replace(form, dropout=0.0)
    exact = both_ways(
        without.formula, [x.detach().double().requires_grad_() for x in leaves], [x.double() for x in sent]
    )
    fused, plain = (both_ways(attend, leaves, sent) for attend in (without.fused, without.formula))
    for got, theirs, expected in zip(fused, plain, exact, strict=True):
        error, allowed = ((x.double() - expected).abs().max() for x in (got, theirs))
        if not error <= 2.0 * allowed + 1e-3 * expected.abs().max():
            raise AssertionError(f"{form.name}: error {error:.1e} where the formula's is {allowed:.1e}")


def run(
    nodes: Sequence[int], device: str, left_out: dict[str, str], precisions: Sequence[str] = ("ieee",)
) -> Iterator[dict[str, Any]]:
    """Yield a result for each size, precision and form; ``left_out`` collects the reasons for missing rivals."""
    for size, precision, form in itertools.product(nodes, precisions, FORMS):
        torch.compiler.reset()  # a program for each size
        set_precision(precision)
        leaves, sent = problem(form, size, device, precision)
        check(form, leaves, sent)
        attends = {"fused": form.fused} | ready_rivals(form, device, precision, leaves, sent, left_out)
        calls = {name: timed(attend, leaves, sent) for name, attend in attends.items()}
        calls["products"] = products(leaves, sent)
        result = {
            "device": device,
            "nodes": size,
            "precision": precision,
            "form": form.name,
            "threads": torch.get_num_threads(),
            "timings": harness.interleaved(calls, device=device, measurements=9),
            "memory": {name: harness.peak_memory(call, device) for name, call in calls.items()},
        }
        if device == "cuda":
            result["replayed"] = harness.replays(calls, left_out, measurements=9)
        yield result


def ready_rivals(
    form: Form,
    device: str,
    precision: str,
    leaves: list[Tensor],
    sent: list[Tensor],
    left_out: dict[str, str],
) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """The rivals that ran once, compiled; ``left_out`` gets why another did not."""
    ready = {}
    for name, attend in form.rivals(device).items():
        try:
            both_ways(attend, leaves, sent)
        except Exception as error:  # no compiler, or what it cannot do
            left_out[f"{name}, {form.name}, {precision}"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            ready[name] = attend
    return ready


def report(results: Sequence[dict[str, Any]]) -> str:
    """A table, a line a size and form: the fused time, the rivals' times over it, and memory."""
    rivals = [name for name in NAMES[1:] if any(name in r["timings"] for r in results)]
    header = [
        "nodes",
        "precision",
        "form",
        "fused",
        *(f"{name} / fused" for name in rivals),
        "memory",
        "eager / fused",
    ]
    rows = []
    for r in results:
        timings, memory = harness.best_timings(r), r["memory"]
        ours = timings["fused"].median
        rows.append(
            [
                str(r["nodes"]),
                r.get("precision", "ieee"),
                r["form"],
                harness.duration(ours),
                *(f"{timings[name].median / ours:.2f}" if name in timings else "" for name in rivals),
                harness.memory(memory["fused"]),
                f"{memory['eager'] / memory['fused']:.1f}" if memory["fused"] else "",
            ]
        )
    return harness.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("benchmarks.edge_options", __doc__)
    parser.add_argument("--device", choices=tuple(FUSED_BACKEND), default="cpu")
    parser.add_argument(
        "--nodes", type=int, nargs="+", help="of a graph (default: 64, 256, 1024; on a GPU 256)"
    )
    parser.add_argument("--precision", nargs="+", choices=("ieee", "tf32", "bfloat16"), help="of a GPU")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args(argv)
    precisions = arguments.precision or PRECISIONS[arguments.device]
    if arguments.device == "cpu" and set(precisions) != {"ieee"}:
        parser.exit(2, "edge_options: --precision: a CPU is timed in ieee alone\n")
    nodes = arguments.nodes or NODES[arguments.device]
    if min(nodes) < 1:
        parser.exit(2, f"edge_options: --nodes: expected at least 1, got {min(nodes)}\n")
    need_fused(parser, "edge_options", arguments.device, "edge_attention")
    harness.keep_freed_memory()
    left_out: dict[str, str] = {}
    results = harness.collect(
        "edge_options", run(nodes, arguments.device, left_out, precisions), arguments.out
    )
    print(report(results))
    harness.fail_for(left_out)


if __name__ == "__main__":
    main()
