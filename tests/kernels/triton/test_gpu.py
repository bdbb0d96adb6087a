"""Tests that need a GPU: low precision, equal bits, CUDA graphs, compilation, memory, length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ecore_kernels import (
    EdgeList,
    EdgeUpdate,
    EmotionGraph,
    edge_attention,
    edge_readout,
    graph_attention,
    sparse_attention,
)

pytestmark = pytest.mark.gpu

SCALE = 100**-0.5


def contexts(
    batch: int = 4, words: int = 64, emotions: int = 32, dim: int = 100, layers: int = 2, dtype=torch.float32
) -> tuple[EmotionGraph, list[EdgeUpdate], Tensor]:
    """A graph with a few words in the finer resolutions, layers and values on the GPU; all leaves want gradients."""
    thresholds = (0.0, 0.2, 0.24)
    graph = EmotionGraph.from_intensity(
        torch.rand(batch, words, device="cuda") * 0.25,
        torch.randint(words // 2, words + 1, (batch,), device="cuda"),
        thresholds,
        torch.randn(emotions, emotions, device="cuda").softmax(-1).requires_grad_(),
        torch.randn(batch, emotions, device="cuda").softmax(-1).requires_grad_(),
    )
    lead = (batch, len(thresholds), words + emotions)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(dtype).requires_grad_()

    updates = [EdgeUpdate(leaf(*lead, dim), leaf(*lead, dim), leaf(*lead), leaf()) for _ in range(layers)]
    return graph, updates, leaf(*lead, dim)


def leaves_of(graph: EmotionGraph, updates: list[EdgeUpdate], value: Tensor) -> list[Tensor]:
    last, past = updates[-1], updates[:-1]
    history = [x for update in past for x in update]
    return [last.query, last.key, value, *history, graph.emotion_weight, graph.correlation]


def attend(graph, updates, value, backend, receivers="all"):
    last = updates[-1]
    return graph_attention(
        last.query, last.key, value, graph, updates[:-1], scale=SCALE, receivers=receivers, backend=backend
    )


def widened(graph, updates, value):
    """The same in float64."""

    def wide(x):
        return x.detach().double().requires_grad_()

    graph = EmotionGraph(
        graph.word_weight.double(), graph.word_mask, wide(graph.emotion_weight), wide(graph.correlation)
    )
    return graph, [EdgeUpdate(*map(wide, update)) for update in updates], wide(value)


def plain(graph, updates, value):
    """The layers as anybody would write them, in the type of their inputs."""
    edge, neighbors = (x.to(value.dtype) if x.is_floating_point() else x for x in graph.dense())
    for query, key, gate, edge_scale in updates:
        weighted = SCALE * (query @ key.mT) * edge
        output = weighted.masked_fill(~neighbors, -1e4).softmax(-1).masked_fill(~neighbors, 0.0) @ value
        edge = (gate[..., None] * edge_scale * (edge + weighted)).masked_fill(~neighbors, 0.0)
    return output


@pytest.fixture
def tf32():
    """float32 products on tensor cores, ours and torch's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def sizes(leaves: list[Tensor], gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the magnitudes that rounding is compared with; an edge scale's are its terms, whose sum may be near 0."""
    found = []
    for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        if not leaf.dim():  # it stands behind its gate
            gradient = leaves[number - 1] * gradients[number - 1] / leaf
        found.append(gradient.norm())
    return found


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_error_is_within_twice_plain_pytorchs(layers, dtype):
    given = contexts(layers=layers, dtype=dtype)
    exact_given = widened(*given)
    exact = attend(*exact_given, "reference")
    upstream = torch.randn_like(exact)
    exact_gradients = torch.autograd.grad(exact, leaves_of(*exact_given), upstream)
    rounding = 1e-3 if dtype is torch.float32 else torch.finfo(dtype).eps
    results = []
    for output in (attend(*given, "triton"), plain(*given)):
        gradients = torch.autograd.grad(output, leaves_of(*given), upstream.to(dtype))
        results.append([output, *gradients])
    norms = [exact.norm(), *sizes(leaves_of(*exact_given), exact_gradients)]
    for ours, theirs, right, norm in zip(*results, [exact, *exact_gradients], norms, strict=True):
        error, allowed = ((x.double() - right).norm() for x in (ours, theirs))
        assert error <= 2 * allowed + rounding * norm


def test_ieee_is_float32_all_the_way():
    assert torch.get_float32_matmul_precision() == "highest"
    given = contexts(batch=2, words=32)
    exact_given = widened(*given)
    output, exact = attend(*given, "triton"), attend(*exact_given, "reference")
    upstream = torch.randn_like(exact)
    pairs = zip(
        [output, *torch.autograd.grad(output, leaves_of(*given), upstream.float())],
        [exact, *torch.autograd.grad(exact, leaves_of(*exact_given), upstream)],
        strict=True,
    )
    for ours, right in pairs:
        assert (ours.double() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_run_gives_the_same_bits(dtype):
    graph, updates, value = contexts(16, 128, dtype=dtype)
    edge, neighbors = (x.detach() for x in graph.dense())
    edge = edge[:1].requires_grad_()  # shared by the batch: its gradient is a sum over it

    def run():
        last = updates[-1]
        dense, new_edge = edge_attention(
            last.query,
            last.key,
            value,
            edge,
            neighbors,
            gate=last.gate,
            edge_scale=last.edge_scale,
            scale=SCALE,
        )
        outputs = [
            attend(graph, updates, value, "triton"),
            *edge_readout(graph, updates, scale=SCALE, backend="triton"),
            dense,
            new_edge,
        ]
        total = sum(x.float().square().sum() for x in outputs)
        leaves = [*leaves_of(graph, updates, value), last.gate, last.edge_scale, edge]
        return [*outputs, *torch.autograd.grad(total, leaves)]

    first = run()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(run(), first, strict=True))


def test_cuda_graph_of_forward_and_backward():
    graph, updates, value = contexts()
    leaves = leaves_of(graph, updates, value)

    def step():
        output = attend(graph, updates, value, "triton")
        between = edge_readout(graph, updates, scale=SCALE, backend="triton")[1]
        return [output, between, *torch.autograd.grad(output.square().sum() + between.square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and warm up where capture would not allow it
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.7)
    captured.replay()
    for replayed, eager in zip(results, step(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("receivers", ["all", "words"])
def test_compile_without_a_graph_break(receivers):
    graph, updates, value = contexts(2, 20)
    leaves = leaves_of(graph, updates, value)

    def function(*leaves):
        query, key, value, past_query, past_key, gate, edge_scale, weight, correlation = leaves
        rebuilt = EmotionGraph(graph.word_weight, graph.word_mask, weight, correlation)
        history = [EdgeUpdate(past_query, past_key, gate, edge_scale)]
        output = graph_attention(
            query, key, value, rebuilt, history, scale=SCALE, receivers=receivers, backend="triton"
        )
        to_emotion, _ = edge_readout(rebuilt, history, scale=SCALE, backend="triton")
        return output.square().sum() + to_emotion.square().sum()

    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        total = run(*leaves)
        results.append([total, *torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_memory_grows_linearly():
    """Peak memory of forward and backward, above the inputs: no N x N tensor anywhere."""
    peaks = []
    for words in (2048, 4096, 8192):
        graph, updates, value = contexts(1, words, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = attend(graph, updates, value, "triton")
        readout = edge_readout(graph, updates, scale=SCALE, backend="triton")
        (output.sum() + readout[0].sum()).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del graph, updates, value, output, readout
    assert peaks[2] < 2.2 * peaks[1] < 2.2**2 * peaks[0]
    assert peaks[2] < 3 * 8192**2  # not even a byte an edge of the three resolutions


def test_sixteen_thousand_nodes():
    graph, updates, value = contexts(1, 16384 - 32, dtype=torch.bfloat16)
    output = attend(graph, updates, value, "triton")
    output.sum().backward()
    assert output.isfinite().all()
    # The last word hears everybody before it: compare its row with a reference that computes only that one.
    exact_graph, (past, last), exact_value = widened(graph, updates, value)
    heard = graph.participants()[0, 0]
    words, row = graph.shape[2], int(graph.word_mask[0, 0].nonzero()[-1])
    edge = torch.cat([exact_graph.word_weight[0], exact_graph.emotion_weight[0]])
    edge[0] = 1.0
    edge = edge * past.gate[0, 0, row] * past.edge_scale
    edge = edge * (1 + SCALE * past.key[0, 0] @ past.query[0, 0, row])
    weighted = SCALE * (last.key[0, 0] @ last.query[0, 0, row]) * edge
    later = torch.arange(len(heard), device="cuda")
    weighted = weighted.masked_fill(~heard | ((later > row) & (later < words)), float("-inf"))
    expected = weighted.softmax(0) @ exact_value[0, 0]
    assert (output[0, 0, row].double() - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 100])
def test_sparse_attention(dim, dtype):
    """Errors within twice plain PyTorch's, and the same bits in every run; one receiver hears everybody."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(300, (2, 4000), generator=generator)
    index[1, :1000] = 7
    edges = EdgeList.from_edge_index(index.cuda(), 300)
    shapes = [(300, 4, dim)] * 3 + [(4000, 4)] * 2 + [(4000, 4, dim)] * 3
    leaves = [torch.randn(shape, generator=generator).cuda().to(dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(300, 4, dim, generator=generator).cuda()
    names = ("edge", "bias", "key_scale", "key_offset", "value_offset")

    def run(backend, kind):
        given = [x.detach().to(kind).requires_grad_() for x in leaves]
        options = dict(zip(names, given[3:], strict=True))
        output = sparse_attention(*given[:3], edges, **options, scale=None, backend=backend)
        return [output.detach(), *torch.autograd.grad(output, given, upstream.to(kind))]

    exact = run("reference", torch.float64)
    first = run("triton", dtype)
    for ours, theirs, right in zip(first, run("reference", dtype), exact, strict=True):
        error, allowed = ((x.double() - right).norm() for x in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * right.norm()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run("triton", dtype), first, strict=True))
