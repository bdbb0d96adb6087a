"""A value that is not finite changes no bit of what does not hear it: edges, values, queries, keys, gates."""

from __future__ import annotations

import pytest
import torch

from ecore_kernels import EdgeUpdate, EmotionGraph, edge_attention, graph_attention, native, use_backend

BACKENDS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not native.available(), reason="the compiled extension is missing"),
    )
]
# Words, emotions: within a tile; more rows than one; more columns than one; two parts.
SIZES = [(20, 6), (90, 5), (25, 330), (330, 1)]
VALUES = [float("nan"), float("inf")]


def problem(words, emotions, dim=5):
    """Leaves and constants of graph_attention with one layer of history, and who hears whom [B, K, N, N]."""
    torch.manual_seed(words)
    lead = (2, 2, words + emotions)
    mask = torch.rand(2, 2, words) > 0.2
    mask[..., words // 2] = True
    emotion_mask = torch.rand(2, emotions) > 0.2
    emotion_mask[:, 0] = True
    leaves = {name: torch.randn(*lead, dim) for name in ("query", "key", "value", "query 0", "key 0")}
    leaves |= {"gate 0": torch.randn(lead), "grad": torch.randn(*lead, dim)}
    leaves |= {"emotion_weight": torch.rand(2, emotions), "correlation": torch.rand(2, emotions, emotions)}
    leaves["word_weight"] = torch.rand(2, words)

    def graph(of):
        return EmotionGraph(of["word_weight"], mask, of["emotion_weight"], of["correlation"], emotion_mask)

    return leaves, graph, graph(leaves).dense()[1], graph(leaves).participants()


def attend(leaves, graph):
    """Output and gradients of graph_attention by name; ``grad`` is the gradient of the output."""
    here = {
        name: x if name in ("grad", "word_weight") else x.detach().requires_grad_()
        for name, x in leaves.items()
    }
    history = [EdgeUpdate(here["query 0"], here["key 0"], here["gate 0"], torch.ones(()))]
    output = graph_attention(here["query"], here["key"], here["value"], graph(here), history, scale=0.5)
    asked = {name: x for name, x in here.items() if x.requires_grad}
    gradients = torch.autograd.grad(output, list(asked.values()), here["grad"])
    return {"output": output.detach()} | dict(zip(asked, gradients, strict=True))


def assert_same_elsewhere(found, expected, touched):
    """Equal bits outside of the nodes (or elements) in ``touched``, a mask by name; nothing else may differ."""
    for name, wanted in expected.items():
        mask = touched.get(name, torch.zeros((), dtype=torch.bool))
        while mask.dim() and mask.dim() < wanted.dim():
            mask = mask[..., None]
        keep = ~mask.expand(wanted.shape)
        assert bool(wanted[keep].isfinite().all())
        assert torch.equal(found[name][keep], wanted[keep]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["value", "key", "key 0", "query", "query 0", "gate 0", "grad"])
@pytest.mark.parametrize("at", ["word", "emotion"])
def test_a_node_reaches_those_alone_that_hear_it(backend, at, name, size, value):
    words, emotions = size
    with use_backend(backend):
        leaves, graph, neighbors, _ = problem(*size)
        expected = attend(leaves, graph)
        node = words // 2 if at == "word" else words
        leaves = leaves | {name: leaves[name].clone()}
        leaves[name][0, 1, node] = value
        found = attend(leaves, graph)
    here = torch.zeros(2, 2, words + emotions, dtype=torch.bool)
    here[0, 1, node] = True
    # Receivers whose attention, output or gradients are lost, and what those hear.
    lost = (
        here
        if name in ("query", "query 0", "gate 0", "grad")
        else neighbors[..., node] & here.any(-1)[..., None]
    )
    heard = (neighbors & lost[..., None]).any(2)
    touched = dict.fromkeys(("query", "query 0", "gate 0"), lost) | dict.fromkeys(("key", "key 0"), heard)
    if name != "grad":
        touched["output"] = lost
    if name != "value":
        touched["value"] = heard
    by_words = (neighbors & lost[..., None])[:, :, :words].any(2)
    touched["emotion_weight"] = by_words[..., words:].any(1)
    touched["correlation"] = (neighbors & lost[..., None]).any(1)[:, words:, words:]
    assert_same_elsewhere(found, expected, touched)
    assert not bool(found["query"][lost].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_who_takes_no_part_is_not_read(backend, size, value):
    words, _ = size
    with use_backend(backend):
        leaves, graph, _, takes_part = problem(*size)
        expected = attend(leaves, graph)
        absent = ~takes_part
        poisoned = {name: x.clone() for name, x in leaves.items()}
        for name in ("query", "key", "value", "query 0", "key 0", "gate 0", "grad"):
            poisoned[name][absent] = value
        everywhere = absent.all(1)
        poisoned["word_weight"][everywhere[:, :words]] = value
        poisoned["word_weight"][:, 0] = value  # [CLS] sends 1, whatever stands there
        poisoned["emotion_weight"][everywhere[:, words:]] = value
        poisoned["correlation"][everywhere[:, words:, None] | everywhere[:, None, words:]] = value
        poisoned["correlation"].diagonal(dim1=1, dim2=2).fill_(value)  # nobody hears itself
        found = attend(poisoned, graph)
    assert absent.any()
    assert_same_elsewhere(found, expected, {})


def dense_problem(nodes, dim=5):
    torch.manual_seed(nodes)
    neighbors = torch.rand(2, 2, nodes, nodes) > 0.5
    neighbors[..., 2, :] = False  # hears nobody
    neighbors[..., :, 4] = False  # nobody hears it
    lead = (2, 2, nodes)
    leaves = {name: torch.randn(*lead, dim) for name in ("query", "key", "value", "grad")}
    leaves |= {
        "gate": torch.randn(lead),
        "edge": torch.randn(*lead, nodes),
        "grad_new": torch.randn(*lead, nodes),
    }
    return leaves, neighbors


def attend_dense(leaves, neighbors):
    here = {n: x if n.startswith("grad") else x.detach().requires_grad_() for n, x in leaves.items()}
    results = edge_attention(
        here["query"], here["key"], here["value"], here["edge"], neighbors, gate=here["gate"],
        edge_scale=torch.ones(()), scale=0.5,
    )  # fmt: skip
    asked = {name: x for name, x in here.items() if x.requires_grad}
    gradients = torch.autograd.grad(results, list(asked.values()), [here["grad"], here["grad_new"]])
    named = dict(zip(asked, gradients, strict=True))
    return {"output": results[0].detach(), "new_edge": results[1].detach()} | named


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("nodes", [30, 90, 330])
@pytest.mark.parametrize("name", ["value", "key", "query", "gate", "grad"])
@pytest.mark.parametrize("node", [2, 4, 7])
def test_a_node_of_a_dense_graph(backend, node, name, nodes, value):
    with use_backend(backend):
        leaves, neighbors = dense_problem(nodes)
        expected = attend_dense(leaves, neighbors)
        leaves = leaves | {name: leaves[name].clone()}
        leaves[name][0, 1, node] = value
        found = attend_dense(leaves, neighbors)
    here = torch.zeros(2, 2, nodes, dtype=torch.bool)
    here[0, 1, node] = True
    lost = here if name in ("query", "gate", "grad") else neighbors[..., node] & here.any(-1)[..., None]
    pairs = neighbors & lost[..., None]
    heard = pairs.any(2)
    touched = {"query": lost, "key": heard, "edge": pairs}
    if name not in ("grad", "gate"):
        touched["output"] = lost
        touched["gate"] = lost
    if name in ("query", "gate"):
        touched["new_edge"] = pairs
    if name == "key":
        touched["new_edge"] = pairs & (torch.arange(nodes) == node)
    if name in ("key", "query", "grad"):
        touched["value"] = heard
    if name == "gate":
        touched["gate"] = here
    assert_same_elsewhere(found, expected, touched)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("nodes", [30, 330])
def test_edges_off_the_graph_are_not_read(backend, nodes, value):
    with use_backend(backend):
        leaves, neighbors = dense_problem(nodes)
        expected = attend_dense(leaves, neighbors)
        for name in ("edge", "grad_new"):
            leaves[name] = leaves[name].masked_fill(~neighbors, value)
        found = attend_dense(leaves, neighbors)
    assert_same_elsewhere(found, expected, {})
