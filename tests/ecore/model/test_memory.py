"""Padded, packed and unprojected memory give a decoder's blocks the same values and gradients."""

import pytest
import torch
from torch import nn

from ecore.model.memory import PackedMemory, PaddedMemory, UnprojectedMemory
from ecore.model.packing import Packing
from ecore.model.transformer import MultiHeadAttention, stacked
from ecore_kernels import native

DIM, HEADS, WIDTH, BLOCKS = 12, 2, 8, 3

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native: {native.unavailable_reason()}")


def forms(memory, mask, attention):
    layers = [layer for block in attention for layer in (block.key, block.value)]
    (projection,) = stacked([layers])
    layout = Packing.of(mask, int(mask.sum()) + 1)
    return {
        "padded": PaddedMemory(memory, mask, projection, BLOCKS, HEADS),
        "packed": PackedMemory(memory, layout, projection, BLOCKS, HEADS),
        "unprojected": UnprojectedMemory(memory, layout, attention),
    }


def heard_by(form, heard):
    """Return the values of ``heard`` with one form of memory, and their gradients by name."""
    torch.manual_seed(0)
    attention = nn.ModuleList(MultiHeadAttention(DIM, HEADS, WIDTH) for _ in range(BLOCKS)).double()
    memory = torch.randn(4, 7, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1, 1, 0, 0, 1, 1, 0], [1] + [0] * 6]).bool()
    responses = torch.tensor([[1] * 5, [1] * 2 + [0] * 3, [1] + [0] * 4, [1] * 4 + [0]]).bool()
    words = int(responses.sum())
    layout = Packing.of(responses, words + 2)  # and two rows of padding
    query = torch.randn(words + 2, WIDTH, dtype=torch.float64, requires_grad=True)
    values = heard(forms(memory, mask, attention)[form], query, layout, mask)[:words]
    torch.manual_seed(1)
    values.backward(torch.randn_like(values))
    parameters = dict(attention.named_parameters()) | {"memory": memory, "query": query}
    return values, {name: p.grad for name, p in parameters.items() if p.grad is not None}


def attended(memory, query, layout, mask):
    return torch.stack([memory.attended(block, query, layout) for block in range(BLOCKS)], 1)


def scores(memory, query, layout, mask):
    scores = torch.stack(
        [memory.scores(block, query, layout) for block in range(BLOCKS)], 1
    )  # [R, blocks, S]
    return scores.masked_fill(~mask[layout.contexts][:, None], 0.0)


@pytest.mark.parametrize("heard", [attended, scores])
@pytest.mark.parametrize("form", ["packed", "unprojected"])
def test_every_form_gives_what_padded_places_give(form, heard):
    wanted, wanted_gradients = heard_by("padded", heard)
    values, gradients = heard_by(form, heard)
    torch.testing.assert_close(values, wanted, rtol=1e-12, atol=1e-12)
    # The keys' bias among them, which processes that share gradients wait for.
    asked = {
        name for name in wanted_gradients if name != "query" and (heard is attended or "value" not in name)
    }
    assert asked <= gradients.keys()
    for name in asked:
        torch.testing.assert_close(gradients[name], wanted_gradients[name], rtol=1e-11, atol=1e-12, msg=name)
    words = len(values)
    torch.testing.assert_close(gradients["query"][:words], wanted_gradients["query"][:words])


def test_the_form_that_multiplies_less_is_chosen(make):
    pays = UnprojectedMemory.pays
    # The `paper` preset's sizes: a batch of 16 has some 240 words in responses and 860 in contexts.
    assert pays(240, 860, 16, heads=3, width=300, dim=300)
    # As many words of responses as of contexts; the rivals' narrow heads.
    assert not pays(860, 860, 16, heads=3, width=300, dim=300)
    assert not pays(240, 860, 16, heads=2, width=40, dim=300)

    model, batch = make.model(), make.batch()
    chosen = []
    for name in ("_unprojected", "_projected"):
        original = getattr(model.decoder, name)

        def remember(*arguments, original=original):
            chosen.append(original(*arguments))
            return chosen[-1]

        setattr(model.decoder, name, remember)
    model.loss(batch).total.backward()
    assert [type(memory) for memory in chosen if memory is not None] in ([UnprojectedMemory], [PackedMemory])
    chosen.clear()
    with torch.autocast("cpu", torch.bfloat16):  # which would round the rows themselves
        model.loss(batch)
    assert [type(memory) for memory in chosen if memory is not None] == [PackedMemory]
