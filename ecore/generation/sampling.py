"""Words drawn at random from a model's scores: top-k, top-p, temperature."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ecore.data.batches import Batch
from ecore.generation.decoding import Decoding

NUCLEUS = 256
"""Top-p looks among this many words first."""


def row_numbers(batch: Batch, decoding: Decoding) -> Tensor:
    """Numbers in [0, 1), float64 [B, max_length]: a row's depend on the seed and the row's context words.

    Without a seed each row has its own from torch's generator, so that rows of one context differ.
    """
    count = len(batch.context)
    seeds = [decoding.seed] * count if decoding.seed is not None else torch.randint(2**62, (count,)).tolist()
    rows = []
    for seed, words, length in zip(seeds, batch.context.tolist(), batch.lengths.tolist(), strict=True):
        key = hashlib.blake2b(repr((seed, words[:length])).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        rows.append(torch.rand(decoding.max_length, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(batch.context.device)


def sampled(scores: Tensor, numbers: Tensor, decoding: Decoding) -> Tensor:
    """One word a row by inverting the distribution function at ``numbers`` [B].

    top-k (Fan et al. 2018) first, then top-p (Holtzman et al. 2020): the likeliest words up to the one that
    carries the sum over ``top_p``; at least one is always left.
    """
    # The maximum off first, so that no temperature overflows.
    scores = (scores - scores.amax(-1, keepdim=True)) / decoding.temperature
    vocabulary = scores.shape[1]
    ids: Tensor | None = None
    if decoding.top_k:
        scores, ids = scores.topk(min(decoding.top_k, vocabulary), dim=-1)
    probability = scores.double().softmax(-1)
    if decoding.top_p < 1.0:
        if ids is None:
            probability, ids = _likeliest(probability, decoding.top_p)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= decoding.top_p, 0.0)
    reached = probability.cumsum(-1)
    total = reached[:, -1]
    # The first place where `reached` is over the target: a word without probability is never that place.
    target = torch.minimum(numbers * total, total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(reached, target.unsqueeze(1), right=True)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def _likeliest(probability: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The likeliest words, by falling probability, as many as carry ``share`` in every row; and their ids.

    Sorting the whole vocabulary takes longer than all the rest of a step on CPU. On a GPU it does not, and
    looking whether the words are enough would wait for it.
    """
    vocabulary = probability.shape[1]
    count = vocabulary if probability.is_cuda else min(NUCLEUS, vocabulary)
    while True:
        likeliest, ids = probability.topk(count, dim=-1)
        if count == vocabulary or bool((likeliest.sum(-1) >= share).all()):
            return likeliest, ids
        count = min(8 * count, vocabulary)
