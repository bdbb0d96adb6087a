"""``python -m examples.drop_in``: the losses before and after the changed imports, and the time of a step.

A module is loaded twice: as it is, and with ``layers`` in some of its import lines replaced by ``fused``. Both models
have the same weights. Without dropout they train on the same batches, and their losses are compared; then steps with
dropout (forward, backward, Adam) are timed in turn.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.compare.ratios import FEWEST_ROUNDS, ratio
from benchmarks.workload import WORDS, made_up_batch
from ecore.data.vocabulary import PAD as MADE_UP_PAD
from examples.drop_in import layers
from examples.drop_in.layers import PAD

TOLERANCE = 1e-5
"""Largest relative difference of two losses."""
CHANGES = [
    ("transformer", "Dialogue", ["MultiHeadAttention"]),
    ("transformer", "Dialogue", ["AddNorm"]),
    ("transformer", "Dialogue", ["VocabularyLoss"]),
    ("transformer", "Dialogue", ["MultiHeadAttention", "AddNorm", "VocabularyLoss"]),
    ("graph", "GraphNetwork", ["EdgeLayer"]),
]
"""Modules, their models, and the layers whose imports change: each alone, then all."""
Batch = tuple[Tensor, ...]


class WordsAlone(layers.VocabularyLoss):
    """The plain loss after a change by hand: for words alone, as the fused one is."""

    def forward(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        said = target != PAD
        return super().forward(hidden[said][None], target[said][None])


def changed(name: str, names: Sequence[str]) -> tuple[types.ModuleType, list[str]]:
    """Return the module with these layers imported from ``fused``, and the lines that this changed."""
    module = importlib.import_module(f"examples.drop_in.{name}")
    source, lines = Path(str(module.__file__)).read_text(), []
    for layer in names:
        line = f"from examples.drop_in.layers import {layer}\n"
        assert line in source, f"{name}.py does not import {layer} on a line of its own"
        lines.append(line.strip().replace("layers", "fused"))
        source = source.replace(line, lines[-1] + "\n")
    after = types.ModuleType(f"{name}_fused")
    exec(compile(source, f"{name}_fused.py", "exec"), after.__dict__)
    return after, lines


def dialogues(words: int, count: int, size: int) -> list[Batch]:
    """Batches of made-up contexts and responses of the lengths of EmpatheticDialogues."""
    batches: list[Batch] = []
    for seed in range(count):
        batch, _ = made_up_batch(size, seed, words=words)
        context, response = (
            ids.clamp(min=PAD + 1).masked_fill(ids == MADE_UP_PAD, PAD)
            for ids in (batch.context, batch.response)
        )
        batches.append((context, response, batch.emotion % 32))
    return batches


def graphs(nodes: int, count: int, size: int, width: int = 300, heads: int = 3) -> list[Batch]:
    """Random graphs of which each node hears half the others and itself."""
    batches: list[Batch] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        edge = torch.rand(size, heads, nodes, nodes, generator=generator)
        near = torch.rand(size, heads, nodes, nodes, generator=generator) < 0.5
        adjacency = (near | torch.eye(nodes, dtype=torch.bool)).float()
        batches.append((torch.randn(size, nodes, width, generator=generator), edge, adjacency))
    return batches


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One training step; the loss."""
    loss = model(*batch)[0]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def pair(make: Sequence[Callable[[], nn.Module]]) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """Both models, with the same weights, and an Adam each."""
    models = []
    for one in make:
        torch.manual_seed(0)
        models.append(one())
    models[1].load_state_dict(models[0].state_dict())
    return [(model, torch.optim.Adam(model.parameters(), lr=1e-4)) for model in models]


def difference(make: Sequence[Callable[[], nn.Module]], batches: Sequence[Batch], steps: int) -> float:
    """Return the largest relative difference of the two losses over training steps without dropout."""
    both, worst = pair(make), 0.0
    for model, _ in both:
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    for number in range(steps):
        before, after = (float(step(*one, batches[number % len(batches)])) for one in both)
        worst = max(worst, abs(after / before - 1))
    return worst


def timed(
    make: Sequence[Callable[[], nn.Module]], batches: Sequence[Batch], rounds: int
) -> tuple[list[float], list[float]]:
    """Return seconds of steps before and after, in turn on the same batches."""
    both = pair(make)
    seconds: list[list[float]] = [[], []]
    for number in range(-2, rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            step(*both[which], batches[number % len(batches)])
            if number >= 0:
                seconds[which].append(time.perf_counter() - begin)
    return seconds[0], seconds[1]


def peak(one: tuple[nn.Module, torch.optim.Optimizer], batch: Batch) -> int:
    """Return the bytes that a step allocates at most, after a first one that makes the optimiser's state."""
    step(*one, batch)
    return harness.peak_memory(lambda _: step(*one, batch), "cpu")


def measured(make: Sequence[Callable[[], nn.Module]], batches: Sequence[Batch], rounds: int) -> list[str]:
    """Return the table's cells: seconds before and after, their ratio, peak memory before and after."""
    before, after = timed(make, batches, rounds)
    speedup = ratio(after, before)  # the step before over the step after
    medians = [harness.duration(statistics.median(seconds)) for seconds in (before, after)]
    interval = f"{speedup.median:.2f} ({speedup.low:.2f} – {speedup.high:.2f})"
    return [*medians, interval, *(harness.memory(peak(one, batches[0])) for one in pair(make))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.drop_in",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=31, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--words", type=int, default=WORDS, help="of the vocabulary (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=160, help="of a graph (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args(argv)
    if arguments.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds: expected at least {FEWEST_ROUNDS}, got {arguments.rounds}")
    for name, least in (("words", 64), ("nodes", 1), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: expected at least {least}, got {getattr(arguments, name)}")
    harness.keep_freed_memory()
    rows, wrong = [], []
    data = {
        "transformer": dialogues(arguments.words, 6, arguments.batch_size),
        "graph": graphs(arguments.nodes, 2, arguments.batch_size),
    }
    for name, kind, names in CHANGES:
        after, lines = changed(name, names)
        print(*(f"{name}.py: {line}" for line in lines), sep="\n", flush=True)
        before = importlib.import_module(f"examples.drop_in.{name}")
        compared = [(f"{name}, {' + '.join(names)}", before)]
        if len(names) > 1:
            by_hand, _ = changed(name, [])
            by_hand.__dict__["VocabularyLoss"] = WordsAlone
            compared.append(("the same, against a plain loss of words alone", by_hand))
        sizes = {"words": arguments.words} if name == "transformer" else {}
        for title, plain in compared:
            make = [functools.partial(getattr(module, kind), **sizes) for module in (plain, after)]
            apart = difference(make, data[name], steps=3)
            if not apart <= TOLERANCE:
                wrong.append(f"{title}: losses differ by {apart:.1e}, expected at most {TOLERANCE:.0e}")
            rows.append([title, f"{apart:.0e}", *measured(make, data[name], arguments.rounds)])
    print(f"\n{harness.machine()['cpu']}, {torch.get_num_threads()} threads, {arguments.rounds} rounds\n")
    print(
        harness.table(
            [
                "",
                "losses differ by",
                "before",
                "after",
                "times as fast (99 % interval)",
                "memory before",
                "after",
            ],
            rows,
        )
    )
    for line in wrong:
        print(f"drop_in: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
