"""Batches for whole-step benchmarks: like real ones, and the same as samples and as batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import workload
from ecore.config import PRESETS
from ecore.data.batches import Widths
from ecore.data.vocabulary import CLS, EOS, PAD


def test_made_up_batches_are_like_real_ones():
    batches = [workload.made_up_batch(16, seed) for seed in range(60)]
    contexts = np.concatenate([batch.lengths.numpy() - 1 for batch, _ in batches])
    answers = [int((batch.response != PAD).sum()) for batch, _ in batches]
    assert contexts.mean() == pytest.approx(workload.CONTEXT_WORDS, rel=0.15)
    assert np.mean(answers) / 16 == pytest.approx(workload.RESPONSE_WORDS, rel=0.15)
    for (batch, tokens), counted in zip(batches, answers, strict=True):
        assert tokens == counted
        assert (batch.context[:, 0] == CLS).all()
        assert ((batch.context != PAD).sum(1) == batch.lengths).all()
        assert ((batch.response == EOS).sum(1) == 1).all()
    assert workload.made_up_batch(2, 0, context=100)[0].context.shape == (2, 101)


def test_the_papers_graph_is_measured_at_every_presets_sizes(monkeypatch):
    """The released code's has no backends to compare."""
    config, training = PRESETS["tiny"]
    monkeypatch.setitem(PRESETS, "released", (replace(config, graph_form="released"), training))
    monkeypatch.setattr(workload, "WORDS", 100)
    assert workload.workload(None, "released", 2, 1).model().config == config


def test_made_up_samples_are_the_batches(small):
    samples = small.samples("cpu")
    for rows, (batch, tokens) in zip(small.rows, small.batches, strict=True):
        widths = samples.widths(rows)
        assert samples.tokens(rows) == tokens
        gathered = samples.gather(samples.send(rows), widths)
        extra = samples.concepts - batch.concepts.shape[1]
        wanted = batch._replace(concepts=torch.nn.functional.pad(batch.concepts, (0, extra), value=PAD))
        for ours, theirs in zip(gathered, wanted, strict=True):
            assert torch.equal(ours, theirs)
        wider = samples.gather(samples.send(rows), Widths(32, 32, samples.concepts))
        assert wider.context.shape[1] == wider.response.shape[1] == 32
