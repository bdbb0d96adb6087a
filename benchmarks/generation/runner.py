"""Times of answers: configurations compared, where the time goes, how it grows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.generation.steppers import WITHOUT, Modules, Whole, check, configurations, only
from benchmarks.workload import CONTEXT_WORDS, made_up_batch, workload
from ecore.data.batches import Batch
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import EOS
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.model import ECore
from ecore.model import decoder as decoder_module
from ecore.model import ecore as model_module

WORDS_EACH = 30
COMPARED = (1, 64)
"""Rows of the batches on which configurations are compared."""
BATCHES, CONTEXTS, BEAMS, SAID = (1, 4, 16, 64, 256), (32, 128, 512, 2048), (1, 2, 4, 8), (1, 30, 300, 1000)


class Contexts:
    """Batches of contexts, of a prepared folder's test split or made up, on a device."""

    def __init__(self, data: Path | None, vocabulary: int, device: str) -> None:
        self.split = PreparedData.load(data).test if data else None
        self.vocabulary, self.device = vocabulary, device

    def __call__(self, rows: int, words: int | None = None) -> Batch:
        """``rows`` contexts: of ``words`` words each, made up, or as they are."""
        if self.split is None or words is not None:
            batch, _ = made_up_batch(rows, seed=0, context=words or CONTEXT_WORDS, words=self.vocabulary)
            return batch.to(self.device)
        lengths = self.split.context_lengths
        order = np.argsort(lengths, kind="stable")
        middle = int(np.searchsorted(lengths[order], lengths.mean()))
        first = min(max(middle - rows // 2, 0), len(order) - rows)
        return self.split.batch(order[first : first + rows]).to(self.device)


def _greedy(stepper: Any, parts: Sequence[str], batch: Batch) -> Callable[[], object]:
    decoding = Decoding(max_length=WORDS_EACH)

    def call() -> object:
        with only(parts):
            return generate(stepper, batch, decoding)

    return call


def timed(calls: Mapping[str, Callable[[], object]], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each, run in turn: median, p20, p80, and ``first``, of the call before that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: {
            **{
                key: float(np.percentile(s[1:], at)) for key, at in (("median", 50), ("p20", 20), ("p80", 80))
            },
            "first": s[0],
        }
        for name, s in seconds.items()
    }


def compare(model: ECore, batch: Batch, rounds: int, compiled: bool) -> dict[str, dict[str, float]]:
    """Every configuration's times for answering ``batch``, as :func:`timed` gives them."""
    calls = {}
    for name, (stepper, parts) in configurations(model, compiled).items():
        if len(batch.context) > 1 and isinstance(stepper, Whole) and not isinstance(stepper, Modules):
            continue  # without a cache, and compiled: for one response, or the rest waits for them
        with only(parts):
            check(model, stepper, batch)
        calls[name] = _greedy(stepper, parts, batch)
    return timed(calls, model.device.type, rounds)


def parts(model: ECore, batch: Batch, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of an answer by part, with plain modules and as ecore does it; medians, on CPU."""
    tables = {}
    for name, stepper in (("cache, modules", Modules(model)), ("all (what ecore does)", model)):
        runs = [_clocked(model, stepper, batch) for _ in range(rounds + 1)][1:]
        tables[name] = {part: float(np.median([run[part] for run in runs])) for part in runs[0]}
    return tables


def _clocked(model: ECore, stepper: Any, batch: Batch) -> dict[str, float]:
    spent: dict[str, float] = {}

    @contextlib.contextmanager
    def clock(part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        spent[part] = spent.get(part, 0.0) + time.perf_counter() - begin

    def clocked(call: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
        """``call``, its calls counted to ``names`` in turn."""
        turn = 0

        def run(*arguments: Any) -> Any:
            nonlocal turn
            turn += 1
            with clock(names[(turn - 1) % len(names)]):
                return call(*arguments)

        return run

    own, cross, hidden = "self-attention", "cross-attention", "feed-forward"
    patches: list[contextlib.AbstractContextManager[Any]] = [
        mock.patch.object(Modules, "clock", staticmethod(clock)),
        mock.patch.object(
            decoder_module,
            "project",
            clocked(decoder_module.project, (own, own, cross, cross, cross, hidden, hidden)),
        ),
        mock.patch.object(decoder_module, "attend", clocked(decoder_module.attend, (own, cross))),
        mock.patch.object(model_module, "project", clocked(model_module.project, ("output projection",))),
        mock.patch.object(stepper, "start", clocked(stepper.start, ("keys and values of the context",))),
        mock.patch.object(stepper, "step", clocked(stepper.step, ("steps",))),
        # A greedy step that chooses in the product to the vocabulary.
        mock.patch.object(model, "step_argmax", clocked(model.step_argmax, ("steps",))),
        mock.patch.object(
            model_module,
            "quantized_linear_argmax",
            clocked(model_module.quantized_linear_argmax, ("output projection",)),
        ),
    ]
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack, torch.no_grad():
        with clock("encode"):
            encoding = model.encode(batch)
        for patch in patches:
            stack.enter_context(patch)
        generate(stepper, batch, Decoding(max_length=WORDS_EACH), encoding)
    whole = time.perf_counter() - begin
    steps = spent.pop("steps")
    spent["norms, sums, cache"] = steps - sum(
        spent.get(p, 0.0) for p in (own, cross, hidden, "output projection")
    )
    spent["choice"] = whole - steps - spent["encode"] - spent["keys and values of the context"]
    return spent


def growth(model: ECore, contexts: Contexts, rounds: int) -> dict[str, dict[int, float]]:
    """Seconds a word over the batch's size, the context's length, the beams and the words already said."""

    def seconds(call: Callable[[], object], words: int, measurements: int = rounds) -> float:
        return timed({"": call}, model.device.type, measurements)[""]["median"] / words

    everything = tuple(WITHOUT)
    result: dict[str, dict[int, float]] = {
        "batch": {b: seconds(_greedy(model, everything, contexts(b)), b * WORDS_EACH) for b in BATCHES},
        "context words": {
            n: seconds(_greedy(model, everything, contexts(1, n)), WORDS_EACH) for n in CONTEXTS
        },
        "beams": {},
        "words already said": {},
    }
    for beams in BEAMS:
        decoding = Decoding("beam", beams=beams, max_length=WORDS_EACH)
        result["beams"][beams] = seconds(partial(generate, model, contexts(1), decoding), WORDS_EACH)
    with torch.inference_mode():
        cache = model.start(model.encode(contexts(1)), max(SAID) + 1)
        cache.keys_values.zero_()
        word = torch.full((1,), 5, device=model.device)
        for said in SAID:

            def step(said: int = said) -> object:
                cache.length = said
                return model.step(word, cache)

            result["words already said"][said] = seconds(step, 1, 10 * rounds)
    return result


def run(data: Path | None, preset: str, device: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """All measurements of one preset."""
    work = workload(data, preset, number=1)
    model = work.model().to(device).eval()
    with torch.no_grad():
        model.output.bias[EOS] = -1e4
    contexts = Contexts(data, len(model.vocabulary), device)
    compared = []
    for rows in COMPARED:
        batch = contexts(rows)
        timings = compare(model, batch, rounds, compiled and rows == 1)
        where = parts(model, batch, rounds) if device == "cpu" else {}
        compared.append({"batch": rows, "timings": timings, "parts": where})
    grown = growth(model, contexts, rounds)
    return {
        "preset": preset,
        "device": device,
        "contexts": work.name,
        "compared": compared,
        "growth": grown,
    }
