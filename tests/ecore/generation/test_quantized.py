"""Answers with weights of few bits: those of a model whose weights were rounded so."""

from __future__ import annotations

import copy

import pytest
import torch

from ecore import pipeline
from ecore.data.vocabulary import BOS
from ecore.errors import InputError
from ecore.generation import search
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.model import ECore
from ecore.model.decoder import DecoderCache
from ecore.model.transformer import FEWER_ROWS
from ecore_kernels import QuantizedLinear, native
from tests.ecore.generation.dialogues import CONTEXTS, differing_model, real_batch

needs_native = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
KINDS = {"int8": torch.int8, "bfloat16": torch.bfloat16}
DECODINGS = [
    Decoding(max_length=12),
    Decoding(max_length=12, no_repeat_ngram=1),
    Decoding("beam", beams=3, max_length=8),
    Decoding("sample", seed=4, max_length=8),
]


@pytest.fixture(scope="module")
def model() -> ECore:
    return differing_model("soft").float()


def rounded(model: ECore, weights: str) -> ECore:
    """A copy whose own weights are those of few bits, where a step reads them; keys of the context stay."""
    other = copy.deepcopy(model)
    layers = [other.output]
    for block in other.decoder.blocks:
        own, cross = block.self_attention, block.cross_attention
        layers += [own.query, own.key, own.value, own.output, cross.query, cross.output, block.join_context]
        layers += [block.feed_forward[0], block.feed_forward[2]]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(QuantizedLinear.of(layer.weight, dtype=KINDS[weights]).dequantized())
    return other


@pytest.fixture
def quantized(model: ECore):
    """The model with weights of few bits, until the test is over."""
    yield lambda weights: model.quantize(weights) or model
    model.quantize("float32")


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_answers_are_those_of_rounded_weights(model, quantized, weights, decoding):
    batch = real_batch(model, CONTEXTS)
    expected = generate(rounded(model, weights), batch, decoding)
    assert generate(quantized(weights), batch, decoding) == expected


@pytest.mark.parametrize("weights", KINDS)
def test_logits_are_those_of_rounded_weights(model, quantized, weights):
    batch = real_batch(model, CONTEXTS)
    with torch.inference_mode():
        words = torch.full((len(CONTEXTS),), BOS)
        logits = []
        for one in (rounded(model, weights), copy.deepcopy(model), quantized(weights)):
            cache = one.start(one.encode(batch), 3)
            for _ in range(3):
                step = one.step(words, cache)
            logits.append(step)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-3, atol=1e-3)
    assert (logits[2] - logits[1]).abs().max() > 1e-2  # something was rounded


@pytest.mark.parametrize("weights", ["int8", pytest.param("float32", marks=needs_native)])
def test_greedy_search_writes_no_logits(model, quantized, monkeypatch, weights):
    batch, decoding = real_batch(model, CONTEXTS), Decoding(max_length=12, no_repeat_ngram=2)
    quantized(weights)
    monkeypatch.setattr(DecoderCache, "chooses", False)
    expected = generate(model, batch, decoding)
    monkeypatch.undo()
    monkeypatch.setattr(ECore, "step", lambda *_: pytest.fail("logits were written"))
    assert generate(model, batch, decoding) == expected


def test_float32_weights_are_read_as_they_are_for_few_rows(model, monkeypatch):
    """They are the model's own, in place; more rows, and steps with a gradient, take the libraries' products."""
    with torch.inference_mode():
        few = model.start(model.encode(real_batch(model, CONTEXTS[:2])), 2)
        many = model.start(model.encode(real_batch(model, CONTEXTS[:1] * (FEWER_ROWS + 1))), 2)
    assert (few.output is not None) == native.available()
    assert few.output is None or few.output.weight.data_ptr() == model.output.weight.data_ptr()
    assert many.output is None
    assert model.start(model.encode(real_batch(model, CONTEXTS[:2])), 2).output is None

    decoding = Decoding("beam", beams=FEWER_ROWS, max_length=6)  # more rows than contexts
    answers = generate(model, real_batch(model, CONTEXTS[:3]), decoding)
    monkeypatch.setattr(ECore, "_output_of_few", lambda *_: None)
    assert generate(model, real_batch(model, CONTEXTS[:3]), decoding) == answers


def test_copying_reads_all_logits(quantized):
    pass_through = differing_model("soft").float()
    config = pass_through.config
    copying = ECore(
        type(config)(**{**vars(config), "copy": True}), pass_through.vocabulary, pass_through.tables
    ).eval()
    copying.quantize("int8")
    batch = real_batch(copying, CONTEXTS)
    expected = generate(rounded(copying, "int8"), batch, Decoding(max_length=6))
    assert generate(copying, batch, Decoding(max_length=6)) == expected


def test_changed_weights_are_rounded_anew(model):
    """After a step of training, weights read from a file, and a move to another place in memory."""
    other = copy.deepcopy(model)
    other.quantize("int8")
    batch, decoding = real_batch(model, CONTEXTS), Decoding(max_length=12)
    before = generate(other, batch, decoding)
    made = other.quantized.present()
    assert other.quantized.present() is made  # not at every call
    with torch.no_grad():
        other.decoder.blocks[0].feed_forward[0].weight.mul_(-1.0)
    assert generate(other, batch, decoding) == generate(rounded(other, "int8"), batch, decoding) != before
    other.load_state_dict(model.state_dict())
    assert generate(other, batch, decoding) == before
    other.double().float()
    assert generate(other, batch, decoding) == before
    assert generate(copy.deepcopy(other), batch, decoding) == before


def test_the_models_own_weights_stay(model, tmp_path):
    answering = pipeline.ECore(copy.deepcopy(model))
    said = "I lost my keys this morning."
    plain = answering.respond(said)
    state = {name: x.clone() for name, x in answering.model.state_dict().items()}
    assert answering.quantize() is answering
    assert answering.model.quantized.dtype is torch.int8
    assert answering.respond(said).emotions == plain.emotions
    batch = real_batch(model, CONTEXTS)._replace(response=torch.full((len(CONTEXTS), 3), 9))
    with torch.no_grad():
        assert torch.equal(answering.model(batch).logits, model(batch).logits)
    assert answering.model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in answering.model.state_dict().items())
    assert "".join(answering.stream(said)) == answering.respond(said)
    assert answering.quantize("float32").respond(said) == plain
    assert answering.model.quantized is None


def test_what_is_refused(model):
    answering = pipeline.ECore(copy.deepcopy(model))
    with pytest.raises(InputError, match="weights: expected one of float32, bfloat16, int8, got 'int4'"):
        answering.quantize("int4")
    with torch.no_grad():
        answering.model.output.weight[3, 0] = torch.nan
    for weights in KINDS:
        with pytest.raises(InputError, match="weights are not finite"):
            answering.quantize(weights).respond("I lost my keys.")
    answering.to("meta")
    with pytest.raises(InputError, match="weights: expected float32 on meta; int8 and bfloat16 are for CPUs"):
        answering.quantize("int8")
    answering.quantize("float32")


def test_scores_that_are_not_finite(model, quantized, monkeypatch):
    quantized("int8")
    batch = real_batch(model, CONTEXTS)
    with torch.no_grad():
        bias = model.output.bias.clone()
        model.output.bias[0] = torch.inf  # PAD's, which may not come
    try:
        with pytest.raises(InputError, match="scores of words are not finite"):
            generate(model, batch)
    finally:
        model.output.bias.data.copy_(bias)


def test_recorded_steps_are_of_the_models_own(model, quantized, monkeypatch):
    """A CUDA graph would read weights that are made anew where they no longer lie."""
    cache = quantized("int8").start(model.encode(real_batch(model, CONTEXTS)), 4)
    assert search.cuda_graph.step_graph(model, cache) is None
    assert search.cuda_graph.step_graph(model, cache) is None
