"""EmpDG's equations: two encoders, of all words and of the emotional ones."""

from __future__ import annotations

import torch

from ecore.baselines.base import encode


@torch.no_grad()
def test_equations(make):
    """The emotion encoder reads the sequence of emotional words as if there were no others."""
    model, batch = make.model("empdg").double(), make.batch()
    encoding, words = model.encode(batch), batch.context.shape[1]
    parted = 0
    for row, length in enumerate(batch.lengths.tolist()):
        ids = batch.context[row, :length]
        kept = [0, *(i for i in range(1, length) if model.intensity[ids[i]] > 0)]
        parted += 1 < len(kept) < length
        everything = torch.ones(1, length, dtype=torch.bool)
        vectors = model.embedding.word.weight[ids] * 24**0.5
        state = model.embedding.state.weight[batch.state[row, :length]]
        semantic = encode(
            model.encoder, (vectors + model.embedding.position[:length] + state)[None], everything
        )[0]
        emotion = encode(
            model.emotion_encoder,
            (vectors[kept] + model.embedding.position[: len(kept)])[None],
            everything[:, : len(kept)],
        )[0]
        torch.testing.assert_close(encoding.memory[row, :length], semantic)
        torch.testing.assert_close(encoding.memory[row, words:][kept], emotion)
        mask = encoding.memory_mask[row]
        assert mask[:words].nonzero().flatten().tolist() == list(range(length))
        assert mask[words:].nonzero().flatten().tolist() == kept
        logits = model.perceiver.main.weight @ torch.cat([emotion[0], semantic[0]])
        torch.testing.assert_close(encoding.perceived.main_logits[row], logits)
        start = model.start_word.weight @ logits + model.start_word.bias
        torch.testing.assert_close(model._bos_embedding(encoding)[row], start)
    assert parted > 2


@torch.no_grad()
def test_a_floor_makes_no_word_emotional(make):
    """`ecore prepare --intensity-floor` raises every word's intensity, an unknown one's, too."""
    model, batch = make.model("empdg"), make.batch()
    before = model.emotional(batch, batch.context != 0)
    model.intensity.clamp_(min=0.001)
    assert before[:, 1:].any()
    assert torch.equal(model.emotional(batch, batch.context != 0), before)


@torch.no_grad()
def test_emotional_words_can_be_copied_from_both(make):
    model, batch = make.model("empdg"), make.batch()
    encoding, words = model.encode(batch), batch.context.shape[1]
    assert torch.equal(encoding.copyable.words[:, :words], batch.context)
    emotional = model.emotional(batch, batch.context != 0)
    assert torch.equal(encoding.copyable.words[:, words:], batch.context * emotional)
