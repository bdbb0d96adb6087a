"""Packed responses: the losses, scores and gradients of padded ones, from rows of words alone."""

from collections import Counter

import pytest
import torch

from ecore.data.vocabulary import EOS, PAD
from ecore.model import memory, packing, transformer
from ecore.model.packing import Packing, Padded, attends_among_rows, layout_of
from ecore.training.schedule import adam, set_rate
from ecore_kernels import native, use_backend, varlen_attention

needs_native = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
MODELS = {
    "soft": {},
    "hard": {"strategy": "hard"},
    "no perceiver": {"strategy": "none"},
    "no graph": {"ablations": ("graph",)},
    "copying and the emotions' start": {"copy": True, "emotion_start": True},
}


def counted(batch):
    return int((batch.response != PAD).sum())


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_losses_and_gradients_are_those_of_padded_responses(make, settings):
    model, batch = make.model(**settings), make.batch()
    words, places = counted(batch), batch.response.numel()
    assert words + 3 < places
    found = {}
    for tokens in (places, words, words + 2, places - 1):  # the first is not packed
        losses = model.loss(batch, tokens=tokens)
        losses.total.backward()
        scores = model.score(batch, tokens).nll
        found[tokens] = losses, scores, {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
    losses, scores, gradients = found.pop(places)
    for packed, packed_scores, others in found.values():
        for name in ("total", "generation", "emotion", "correlation", "nll", "tokens", "correct"):
            torch.testing.assert_close(getattr(packed, name), getattr(losses, name))
        torch.testing.assert_close(packed_scores, scores)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_responses_without_padding_stay_as_they_are(make):
    model, batch = make.model(), make.batch()
    full = torch.full_like(batch.response, EOS)
    for tokens in (None, full.numel()):
        losses = model.loss(batch._replace(response=full), tokens=tokens)
        assert losses.tokens == full.numel()
        losses.total.backward()


def test_only_words_go_through_the_decoder(make):
    """Every layer of the decoder but attention itself: one row of padding, or up to the number that is given."""
    model, batch = make.model(), make.batch()
    rows = Counter()
    for name, module in model.decoder.named_modules():
        memory = name.endswith(("cross_attention.key", "cross_attention.value", "join_guidance"))
        if not list(module.children()) and not memory and "guidance" not in name:
            module.register_forward_pre_hook(lambda module, x: rows.update([tuple(x[0].shape[:-1])]))
    words = counted(batch)
    for tokens, count in ((None, words + 1), (words, words + 1), (words + 4, words + 5)):
        rows.clear()
        model.loss(batch, tokens=tokens)
        assert set(rows) == {(count,)}


def test_few_steps_are_those_of_padded_responses(make):
    batches, finals = [make.batch(seed=seed) for seed in range(3)], []
    for padded in (False, True):
        model = make.model()
        optimizer = adam(model.parameters())
        set_rate(optimizer, 1e-3)
        for batch in batches * 2:
            loss = model.loss(batch, tokens=batch.response.numel() if padded else None).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(loss.item())
    assert finals[0] == pytest.approx(finals[1], rel=1e-5)


def test_rows_come_and_go():
    response = torch.tensor([[5, 6, EOS, PAD], [EOS, PAD, PAD, PAD]])
    packing = Packing.of(response != PAD, 6)
    assert packing.places.tolist() == [0, 1, 2, 4, 3, 5]
    assert packing.rows_of.tolist() == [0, 1, 2, 4, 3, 5, 5, 5]
    assert packing.contexts.tolist() == [0, 0, 0, 1, 0, 1]
    assert packing.columns.tolist() == [0, 1, 2, 0, 3, 1]
    assert torch.equal(packing.pack(response).unsqueeze(1)[:4], torch.tensor([[5], [6], [EOS], [EOS]]))
    assert torch.equal(packing.unpack(packing.pack(response)), response)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, dtype=torch.float64)
    weight[4:] = 0.0  # nothing depends on rows that are no words
    ours, wanted = (
        torch.autograd.grad((layout.spread(x) * at).sum(), x)[0]
        for layout, at in (
            (packing, weight),
            (Padded(2, 4), packing.unpack(weight).flatten(0, 1)),
        )
    )
    torch.testing.assert_close(ours, wanted)


AMONG_ROWS = {
    "no perceiver, with emotions": {"strategy": "none", "emotions": True},
    "soft": {},
    "hard": {"strategy": "hard"},
    "copying and the emotions' start": {"copy": True, "emotion_start": True},
    "related words": {"commonsense": True, "copy": True},
    "released": {
        "encoder_blocks": 2,
        "attention_dim": 16,
        "thresholds": (0.0, 0.15),
        "copy": True,
        "emotion_start": True,
        "graph_form": "released",
    },
}


@pytest.fixture
def calls(monkeypatch):
    """Counts the model's calls of varlen_attention."""
    counts = Counter()

    def counted_attention(*arguments, **options):
        counts["causal" if options.get("causal") else "to others" if len(arguments) > 4 else "to itself"] += 1
        return varlen_attention(*arguments, **options)

    for module in (transformer, memory):
        monkeypatch.setattr(module, "varlen_attention", counted_attention)
    return counts


@needs_native
@pytest.mark.parametrize("full", [False, True], ids=["padding in contexts", "no padding in contexts"])
@pytest.mark.parametrize("settings", AMONG_ROWS.values(), ids=AMONG_ROWS)
def test_attention_among_rows_is_that_of_padding(make, monkeypatch, calls, settings, full):
    """Losses, scores and every gradient in float64, whether responses are packed or not."""
    model, batch = make.model(**settings).double(), make.batch()
    if full:
        first = [0] * len(batch.lengths)
        batch = batch._replace(
            context=batch.context[first], state=batch.state[first], lengths=batch.lengths[first],
            concepts=batch.concepts[[3] * 4],
        )  # fmt: skip
    blocks = model.config.encoder_blocks, model.config.decoder_blocks
    found = []
    for among_rows in (True, False):
        if not among_rows:
            monkeypatch.setattr(packing, "attends_among_rows", lambda x: False)
        for tokens in (counted(batch), batch.response.numel()):
            calls.clear()
            losses = model.loss(batch, tokens=tokens)
            losses.total.backward()
            packed = among_rows and tokens == counted(batch)
            assert calls == Counter(
                {
                    "to itself": blocks[0] * (among_rows and not full),
                    "causal": blocks[1] * packed,
                    "to others": blocks[1] * (packed and not full),
                }
            )
            scores = model.score(batch, tokens).nll
            found.append((losses, scores, {name: p.grad for name, p in model.named_parameters()}))
            model.zero_grad()
    losses, scores, gradients = found.pop()
    assert losses.total.dtype is torch.float64
    assert any(g is not None and g.any() for name, g in gradients.items() if "attention" in name)
    for ours, our_scores, others in found:
        for name in ("total", "generation", "emotion", "correlation", "nll", "tokens", "correct"):
            torch.testing.assert_close(getattr(ours, name), getattr(losses, name), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(our_scores, scores, rtol=1e-9, atol=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


@needs_native
def test_attention_among_rows_in_float32(make, monkeypatch):
    model, batch = make.model(copy=True, emotion_start=True), make.batch()
    found = []
    for _ in range(2):
        losses = model.loss(batch)
        losses.total.backward()
        found.append((losses.total.detach(), [p.grad for p in model.parameters()]))
        model.zero_grad()
        monkeypatch.setattr(packing, "attends_among_rows", lambda x: False)
    (ours, gradients), (total, others) = found
    torch.testing.assert_close(ours, total)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_where_attention_is_among_rows(monkeypatch):
    x, mask = torch.ones(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    assert attends_among_rows(x) == native.available()
    assert not attends_among_rows(x.to("meta"))
    with use_backend("reference"):
        assert not attends_among_rows(x)
        assert layout_of(mask) == Padded(2, 3)
        assert Packing.of(mask, 4).sequences is None
    if native.available():
        with use_backend("native"):
            assert attends_among_rows(x)
    compiled = torch.compile(lambda x: x + attends_among_rows(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x)
    monkeypatch.setattr(native, "available", lambda: False)
    assert not attends_among_rows(x)
    assert layout_of(mask) == Padded(2, 3)


@needs_native
def test_sequences_of_packed_rows():
    """The texts, and behind them what is padding; a text without a word is an empty sequence."""
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    for count, behind in ((6, 1), (8, 3)):
        sequences = Packing.of(mask, count).sequences
        assert sequences.lengths.tolist() == [2, 0, 3, behind]
        assert sequences.rows == count
        assert sequences.longest >= 3
    layout = layout_of(mask)
    assert layout.places[:5].tolist() == [0, 1, 6, 7, 8]
    assert layout.sequences.rows == 6
    assert layout_of(mask[2:]) == Padded(1, 3)
