"""Packed responses: the losses, scores and gradients of padded ones, from rows of words alone."""

from collections import Counter

import pytest
import torch

from ecore.data.vocabulary import EOS, PAD
from ecore.model.packing import Packing, Padded
from ecore.training.schedule import adam, set_rate

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
