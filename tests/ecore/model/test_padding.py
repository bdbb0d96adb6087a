"""A sample's neighbours in its batch change nothing: padding is in no softmax, sum or mean.

In float64, where a difference is a leak and not the rounding of sums of other lengths.
"""

from __future__ import annotations

import pytest
import torch

from ecore.config import ABLATIONS

SETTINGS = [
    *(
        {"strategy": s, "ablations": a}
        for s in ("soft", "hard")
        for a in ((), *((one,) for one in ABLATIONS))
    ),
    {"graph_norm": False},
    {"strategy": "hard", "graph_layers": 3},
    {"commonsense": False},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-6 of the largest value."""
    if expected.dtype == torch.bool:
        assert torch.equal(actual, expected)
    else:
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def assert_same_encoding(actual, expected) -> None:
    for one, other in zip(actual.perceived, expected.perceived, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert_same(one, other)


@every_setting
@torch.no_grad()
def test_more_padding_changes_nothing(make, settings):
    model, batch = make.model(**settings).double(), make.batch()
    wider = make.padded(batch, 9)
    output, other = model(batch), model(wider)
    real = batch.response != 0
    assert_same(other.logits[:, : batch.response.shape[1]][real], output.logits[real])
    assert_same_encoding(other.encoding, output.encoding)
    scores, wider_scores = model.score(batch), model.score(wider)
    assert_same(wider_scores.nll, scores.nll)
    assert torch.equal(wider_scores.tokens, scores.tokens)
    losses, wider_losses = model.loss(batch), model.loss(wider)
    for name in ("total", "generation", "emotion", "correlation", "nll"):
        assert_same(getattr(wider_losses, name), getattr(losses, name))
    assert wider_losses.tokens == losses.tokens == real.sum()


@every_setting
@torch.no_grad()
def test_a_batch_of_one_is_its_row(make, settings):
    model, batch = make.model(**settings).double(), make.batch()
    output, scores = model(batch), model.score(batch)
    for row in range(4):
        alone = make.rows(batch, [row])
        words = alone.response.shape[1]
        single = model(alone)
        assert_same(single.logits[0], output.logits[row, :words])
        assert_same(model.score(alone).nll[0], scores.nll[row])
        perceived = output.encoding.perceived
        part = type(perceived)(*(None if x is None else x[row : row + 1] for x in perceived))
        assert_same_encoding(single.encoding, output.encoding._replace(perceived=part))


@torch.no_grad()
def test_padded_memory_is_masked(make):
    model, batch = make.model(), make.batch()
    encoding, words = model.encode(batch), batch.context.shape[1]
    assert encoding.memory.shape == (4, words + 3, 24)
    assert torch.equal(encoding.memory_mask[:, :words], batch.context != 0)
    assert torch.equal(encoding.memory_mask[:, words:], batch.concepts != 0)


@torch.no_grad()
def test_related_words_reach_the_memory_alone(make):
    """They change what the decoder attends to, through it and the encoder; they are no graph nodes."""
    batch = make.batch()
    model, without = make.model(ablations=("co-g",)), make.model(ablations=("co-g",), commonsense=False)
    encoding, bare = model.encode(batch), without.encode(batch)
    assert bare.memory.shape[1] == batch.context.shape[1]
    # Row 0 has no related word: nothing changes there, whatever the columns.
    torch.testing.assert_close(encoding.perceived.global_signal, bare.perceived.global_signal)
    torch.testing.assert_close(encoding.perceived.main_logits[0], bare.perceived.main_logits[0])
    assert not torch.allclose(encoding.perceived.main_logits[3], bare.perceived.main_logits[3], atol=1e-5)
    none = batch._replace(concepts=batch.concepts[:, :0])
    torch.testing.assert_close(model.encode(none).memory, without.encode(none).memory)


@torch.no_grad()
def test_related_words_are_a_set(make):
    model, batch = make.model(), make.batch()
    turned = batch._replace(concepts=batch.concepts.flip(1))
    torch.testing.assert_close(model(turned).logits, model(batch).logits, rtol=1e-4, atol=1e-5)
