"""Generation: what a word costs, what each improvement is worth, where the time goes, how it grows.

``python -m benchmarks.generation [--data PREPARED] [--preset released] [--device cpu] [--out FILE.json]``

``--plot FILE.svg`` draws how it grows; ``--from FILE.json ... --plot FILE.svg`` what was kept, without measuring.

Weights are random and EOS is ruled out, so that every answer has :data:`WORDS_EACH` words, encoding included.
Times are in u (benchmarks/workload.py) and in seconds. Configurations run in turn on the same contexts: with
``--data`` those of the test split, in batches of similar length about the mean as `ecore evaluate` makes them,
else made up in the same sizes. A configuration whose logits are not those of whole responses is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.generation_report import RELEASED_CODE, plot, report
from benchmarks.workload import CONTEXT_WORDS, made_up_batch, unit, workload
from ecore.config import PRESETS
from ecore.data.batches import Batch, PreparedData
from ecore.data.vocabulary import BOS, EOS
from ecore.errors import InputError
from ecore.generation import Decoding, generate
from ecore.model import ECore, Encoding
from ecore.model import decoder as decoder_module
from ecore.model import ecore as model_module
from ecore.model.decoder import DecoderCache
from ecore.model.step_graph import StaticCache

WORDS_EACH = 30
COMPARED = (1, 64)
"""Rows of the batches on which configurations are compared."""
BATCHES, CONTEXTS, BEAMS, SAID = (1, 4, 16, 64, 256), (32, 128, 512, 2048), (1, 2, 4, 8), (1, 30, 300, 1000)
LOGITS = {"rtol": 1e-3, "atol": 1e-3}


class Whole:
    """No cache: the decoder reads all that is said so far for each word."""

    def __init__(self, model: ECore) -> None:
        self.model, self.encode = model, model.encode

    def start(self, encoding: Encoding, max_length: int) -> Whole:
        self.encoding, self.said = encoding, []
        return self

    def step(self, words: Tensor, cache: Whole) -> Tensor:
        self.said.append(words)
        model, encoding = self.model, self.encoding
        states = model.decoder(
            model.embedding(torch.stack(self.said, 1)),
            encoding.memory,
            encoding.memory_mask,
            encoding.guidance,
        ).states
        return model.output(states[:, -1])


class Modules(Whole):
    """A cache, and steps through the model's own modules: a projection each for queries, keys and values, dropout."""

    clock: Callable[[str], contextlib.AbstractContextManager[None]] = staticmethod(
        lambda name: contextlib.nullcontext()
    )

    def start(self, encoding: Encoding, max_length: int) -> Modules:
        blocks = self.model.decoder.blocks
        self.length = 0
        self.mask = encoding.memory_mask[:, None, None, :]
        self.cross = [block.cross_attention.keys_values(encoding.memory) for block in blocks]
        self.own = [[k.new_empty(*k.shape[:2], max_length, k.shape[3]) for k in pair] for pair in self.cross]
        self.guidance = self.model.decoder._guidance(encoding.guidance)
        return self

    def step(self, words: Tensor, cache: Modules) -> Tensor:
        model = self.model
        y = model.embedding(words[:, None], start=self.length)
        for i, block in enumerate(model.decoder.blocks):
            with self.clock("self-attention"):
                normed = block.self_norm(y)
                for kept, new in zip(self.own[i], block.self_attention.keys_values(normed), strict=True):
                    kept[:, :, self.length] = new[:, :, 0]
                seen = (kept[:, :, : self.length + 1] for kept in self.own[i])
                y = y + block.dropout(block.self_attention(block.self_attention.queries(normed), *seen))
            with self.clock("cross-attention"):
                queries = block.cross_attention.queries(block.cross_norm(y))
                attended = block.cross_attention(queries, *self.cross[i], self.mask)
                joined = block.join_context(attended)
                y = y + block.dropout(joined if self.guidance is None else joined + self.guidance[i])
            with self.clock("feed-forward"):
                y = y + block.dropout(block.feed_forward(block.feed_forward_norm(y)))
        self.length += 1
        with self.clock("output projection"):
            return model.output(model.decoder.norm(y[:, 0]))


class Compiled(Whole):
    """The model's own step through torch.compile, on a cache of fixed shapes."""

    def __init__(self, model: ECore) -> None:
        super().__init__(model)
        self.step = torch.compile(model.step)

    def start(self, encoding: Encoding, max_length: int) -> DecoderCache:
        return StaticCache(self.model.start(encoding, max_length))


def _products() -> Any:
    plain = contextlib.ExitStack()
    for module in (decoder_module, model_module):
        plain.enter_context(mock.patch.object(module, "project", F.linear))
    return plain


def _plain_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias).transpose(1, 2).flatten(2)


def _attention() -> Any:
    return mock.patch.object(decoder_module, "attend", _plain_attention)


def _no_graphs() -> Any:
    return mock.patch("ecore.model.step_graph.step_graph", return_value=None)


WITHOUT: dict[str, Callable[[], Any]] = {
    "split products": _products,
    "small attention": _attention,
    "CUDA graphs": _no_graphs,
}
"""Improvements on top of a lean step, and how each is taken out."""


def configurations(model: ECore, compiled: bool) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """By name: what :func:`generate` steps through and which of :data:`WITHOUT` are on."""
    names = [name for name in WITHOUT if name != "CUDA graphs" or model.device.type == "cuda"]
    found: dict[str, tuple[Any, tuple[str, ...]]] = {
        "no cache": (Whole(model), ()),
        "cache, modules": (Modules(model), ()),
        "lean step": (model, ()),
        **{f"lean step, {name}": (model, (name,)) for name in names},
        "all (what ecore does)": (model, tuple(names)),
    }
    if compiled:
        found["all, torch.compile"] = (Compiled(model), tuple(n for n in names if n != "CUDA graphs"))
    return found


@contextlib.contextmanager
def only(parts: Sequence[str]) -> Iterator[None]:
    """Take out every improvement of :data:`WITHOUT` but these."""
    with contextlib.ExitStack() as stack:
        for name, take_out in WITHOUT.items():
            if name not in parts:
                stack.enter_context(take_out())
        yield


def check(model: ECore, stepper: Any, batch: Batch, words: int = 4) -> None:
    """Refuse steps whose logits are not those of the whole response.

    Raises:
        SystemExit: they differ.
    """
    response = torch.randint(5, len(model.vocabulary), (len(batch.context), words), device=model.device)
    with torch.inference_mode():
        encoding = model.encode(batch)
        expected = model(batch._replace(response=response)).logits
        cache = stepper.start(encoding, words + 1)
        read = torch.cat([torch.full_like(response[:, :1], BOS), response[:, :-1]], dim=1)
        for i in range(words):
            try:
                torch.testing.assert_close(stepper.step(read[:, i], cache), expected[:, i], **LOGITS)
            except AssertionError as error:
                raise SystemExit(f"word {i + 1} has not the logits of the whole response: {error}") from None


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
    patches = [
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
        batch = contexts(1)
        result["beams"][beams] = seconds(lambda b=batch, d=decoding: generate(model, b, d), WORDS_EACH)
    with torch.inference_mode():
        cache = model.start(model.encode(contexts(1)), max(SAID) + 1)
        cache.words.zero_()
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
    u = [unit(device)]
    compared = []
    for rows in COMPARED:
        batch = contexts(rows)
        timings = compare(model, batch, rounds, compiled and rows == 1)
        where = parts(model, batch, rounds) if device == "cpu" else {}
        compared.append({"batch": rows, "timings": timings, "parts": where})
    grown = growth(model, contexts, rounds)
    u.append(unit(device))
    told = {"preset": preset, "device": device, "contexts": work.name, "u": min(u)}
    return told | {"compared": compared, "growth": grown}


def _kept(path: Path) -> list[dict[str, Any]]:
    """Results that ``--out`` wrote.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(document, dict) or document.get("benchmark") != "generation":
        raise ValueError(f"{path}: expected results that this benchmark wrote with --out")
    return document["results"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables and write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="PREPARED", help="a folder made by `ecore prepare`")
    parser.add_argument("--preset", choices=list(PRESETS), default="released")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (default: 2)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw how it grows, as .svg or .png")
    parser.add_argument(
        "--from",
        dest="kept",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="draw kept results, up to three presets",
    )
    options = parser.parse_args(arguments)
    if options.kept:
        if options.plot is None:
            parser.error("--from: expected --plot with it")
        try:
            plot([result for file in options.kept for result in _kept(file)], options.plot)
        except ValueError as error:
            parser.error(f"--from: {error}")
        return
    if options.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    torch.set_num_threads(options.threads)
    try:
        result = run(options.data, options.preset, options.device, options.rounds, options.compile)
    except InputError as error:
        parser.error(str(error))
    print(
        f"{options.preset}, {options.device}, {result['contexts']}; u = {harness.duration(result['u'])}; ",
        end="",
    )
    print(f"the released code: {RELEASED_CODE[1]} u a word, {RELEASED_CODE[0]:.0f} words/s, no batches\n")
    print(report(result, WORDS_EACH))
    if options.out:
        harness.write_json(options.out, "generation", [result])
    if options.plot:
        plot([result], options.plot)


if __name__ == "__main__":
    main()
