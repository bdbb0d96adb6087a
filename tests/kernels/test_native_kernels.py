"""The C++ kernels on CPU: against the reference, at sizes that cross their tiles, on every instruction set."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ecore_kernels import (
    EdgeUpdate,
    EmotionGraph,
    edge_attention,
    edge_readout,
    explain,
    graph_attention,
    native,
)
from ecore_kernels.info import report

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled extension is missing")

ROOT = Path(__file__).parents[2]

# Tiles are 72 receivers by 320 senders, panels 6 rows, a large head's sums are cut in parts of 256.
SIZES = [
    # batch, words, emotions, d, dv
    (2, 1, 1, 1, 1),
    (2, 5, 4, 3, 7),
    (1, 17, 1, 7, 5),
    (1, 47, 17, 2, 9),
    (1, 33, 32, 100, 100),
    (1, 79, 32, 128, 20),
    (1, 295, 30, 4, 3),
    (1, 20, 330, 5, 6),
    (1, 560, 9, 3, 2),
    # Rows that are read and written where they lie: whole vectors, or four elements more.
    (2, 190, 30, 12, 8),
    (1, 560, 9, 4, 8),
]


def flat(updates):
    return [x for update in updates for x in update if x is not None]


def problem(make, size, layers, *, gated=True, dtype=torch.float64, **options):
    """A graph, its history, queries and keys of a layer, values."""
    batch, words, emotions, dim, value_dim = size
    graph = make.graph(batch, words, emotions, 2, dtype=dtype, **options)
    history = [make.update(graph, dim, gated=gated, dtype=dtype) for _ in range(layers)]
    return graph, history, make.update(graph, dim, dtype=dtype), make.value(graph, value_dim, dtype)


def attend(graph, history, update, value, **options):
    return graph_attention(
        update.query, update.key, value, graph, history, scale=update.query.shape[3] ** -0.5, **options
    )


def leaves_of(graph, history, update, value):
    return [update.query, update.key, value, *flat(history), graph.emotion_weight, graph.correlation]


@pytest.fixture
def uninitialized_is_nan():
    """Memory that an operator allocates holds NaN, so that what it forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Against the reference --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("receivers", ["all", "words"])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_graph_attention(make, assert_same, size, layers, receivers):
    options = {"masked": layers != 1, "correlation": "batched" if layers else "shared"}
    inputs = problem(make, size, layers, gated=layers != 3, **options)
    actual, expected = (attend(*inputs, receivers=receivers, backend=b) for b in ("native", "reference"))
    assert_same([actual], [expected], leaves_of(*inputs), 1e-11)


@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("per_word", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_edge_readout(make, assert_same, size, layers, per_word):
    graph, history, *_ = problem(make, size, layers, gated=layers != 3, masked=layers != 1)
    scale = size[3] ** -0.5
    actual, expected = (
        edge_readout(graph, history, scale=scale, per_word=per_word, backend=b)
        for b in ("native", "reference")
    )
    assert_same(actual, expected, [*flat(history), graph.emotion_weight, graph.correlation], 1e-11)


@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "nodes, dim, value_dim",
    [(1, 1, 1), (7, 3, 9), (64, 100, 100), (321, 7, 4), (330, 4, 4), (600, 2, 3), (200, 12, 8)],
)
@pytest.mark.parametrize("edge_lead", [(2, 2), (2, 1), (1, 2), (1, 1)])
def test_edge_attention(assert_same, nodes, dim, value_dim, edge_lead, gated):
    query, key, value, gate = (
        torch.randn(2, 2, nodes, *last, dtype=torch.float64, requires_grad=True)
        for last in ((dim,), (dim,), (value_dim,), ())
    )
    edge = torch.randn(*edge_lead, nodes, nodes, dtype=torch.float64, requires_grad=True)
    neighbors = torch.rand(1, 2, nodes, nodes) > 0.6
    neighbors[..., 0, :] = False  # hears nobody
    neighbors[..., -1, :-1] = False  # hears nobody before the last tile
    scale = torch.tensor(0.7, dtype=torch.float64)
    options = {"gate": gate, "edge_scale": scale} if gated else {}
    actual, expected = (
        edge_attention(query, key, value, edge, neighbors, scale=dim**-0.5, backend=b, **options)
        for b in ("native", "reference")
    )
    leaves = [query, key, value, edge, *([gate] if gated else [])]
    count = 2 if gated else 1
    assert_same(actual[:count], expected[:count], leaves, 1e-11)


@pytest.mark.parametrize("edge_lead", [(1, 1), (1, 3), (9, 1)])
def test_an_edge_shared_by_many_adds_up(assert_same, edge_lead):
    """More of them than there are tasks."""
    query, key, value = (torch.randn(9, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    edge = torch.randn(*edge_lead, 5, 5, dtype=torch.float64, requires_grad=True)
    outputs = [edge_attention(query, key, value, edge, backend=b)[:1] for b in ("native", "reference")]
    assert_same(*outputs, [query, key, value, edge])


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_gradcheck(make, operator):
    graph, history, update, value = problem(make, (1, 3, 3, 2, 2), 2, masked=True)
    edge, neighbors = (x.detach() for x in graph.dense())
    edge.requires_grad_()

    def attention(query, key, value, *_):
        return graph_attention(query, key, value, graph, history, backend="native")

    def readout(*_):
        return edge_readout(graph, history, backend="native")

    def dense(query, key, value, *_):
        return edge_attention(
            query,
            key,
            value,
            edge,
            neighbors,
            gate=update.gate,
            edge_scale=update.edge_scale,
            backend="native",
        )

    inputs = [*leaves_of(graph, [*history, update], update, value), edge]  # perturbed in place
    assert gradcheck({"attention": attention, "readout": readout, "dense": dense}[operator], inputs)


@pytest.mark.parametrize("operator", ["attention", "readout", "dense"])
def test_float32_is_as_exact_as_the_reference(make, operator):
    """Errors of outputs and gradients against float64, at the paper's head size.

    Gradients get a little more: it is a single draw, and these scores reach 100. ``test_saturated.py`` takes medians.
    """

    def run(dtype, backend):
        torch.manual_seed(3)
        graph, history, update, value = problem(make, (2, 64, 32, 100, 100), 1, masked=False)
        inputs = [*flat(history), *leaves_of(graph, [], update, value)]
        cast = {id(x): x.detach().to(dtype).requires_grad_() for x in inputs}

        def to(x):
            return cast[id(x)]

        graph = EmotionGraph(
            graph.word_weight.to(dtype), graph.word_mask, to(graph.emotion_weight), to(graph.correlation)
        )
        history = [EdgeUpdate(*map(to, update)) for update in history]
        if operator == "attention":
            outputs = [
                attend(
                    graph, history, EdgeUpdate(to(update.query), to(update.key)), to(value), backend=backend
                )
            ]
        elif operator == "readout":
            outputs = edge_readout(graph, history, scale=0.1, backend=backend)
        else:
            outputs = edge_attention(
                to(update.query), to(update.key), to(value), *graph.dense(), gate=history[0].gate,
                edge_scale=history[0].edge_scale, scale=0.1, backend=backend,
            )  # fmt: skip
        weights = [torch.randn_like(x, dtype=torch.float64).to(dtype) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [to(x) for x in inputs], weights, allow_unused=True)]

    exact = run(torch.float64, "reference")
    results = zip(exact, run(torch.float32, "native"), run(torch.float32, "reference"), strict=True)
    for index, (truth, one, other) in enumerate(results):
        if truth is None:
            continue
        errors = [float((x.double() - truth).detach().abs().max()) for x in (one, other)]
        bound = 2 if index == 0 else 5
        assert errors[0] <= bound * errors[1] + 1e-6 * float(truth.detach().abs().max())


def test_vanishing_and_huge_scores(make):
    """Weights that underflow are exactly 0, and the largest score never overflows."""
    graph, history, update, value = problem(make, (2, 9, 4, 3, 3), 1, dtype=torch.float32)
    for factor in (1e-20, 1e3, 1e6):
        wide = EdgeUpdate(update.query * factor, update.key * factor)
        outputs = [attend(graph, history, wide, value, backend=b) for b in ("native", "reference")]
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


# Properties -------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2), st.integers(0, 2**31))
def test_padding_changes_no_bit(words, emotions, layers, seed):
    """Words beyond the last one and a batch beside it: the same bits for what was there before."""
    torch.manual_seed(seed)
    lead, more = (2, 2), 7
    nodes = [torch.randn(*lead, words + emotions, 5) for _ in range(3 + 2 * layers)]
    mask, correlation = torch.rand(*lead, words) > 0.3, torch.rand(emotions, emotions)
    word_weight, emotion_weight = torch.rand(2, words), torch.rand(2, emotions)

    def run(nodes, mask, word_weight, emotion_weight):
        graph = EmotionGraph(word_weight, mask, emotion_weight, correlation)
        history = [EdgeUpdate(*nodes[3 + 2 * layer : 5 + 2 * layer]) for layer in range(layers)]
        return graph_attention(*nodes[:3], graph, history, backend="native")

    def padded(x):
        return torch.cat(
            [x[:, :, :words], torch.randn(*x.shape[:2], more, x.shape[3]), x[:, :, words:]], dim=2
        )

    small = run(nodes, mask, word_weight, emotion_weight)
    big = run(
        [torch.cat([padded(x), padded(x)]) for x in nodes],
        torch.cat([mask, torch.zeros(*lead, more, dtype=torch.bool)], dim=2).repeat(2, 1, 1),
        torch.cat([word_weight, torch.rand(2, more)], dim=1).repeat(2, 1),
        emotion_weight.repeat(2, 1),
    )
    assert torch.equal(big[2:, :, :words], small[:, :, :words])
    assert torch.equal(big[2:, :, words + more :], small[:, :, words:])
    assert not big[:, :, words : words + more].any()


# Threads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Sets torch's number of threads, which the extension follows, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(make, size):
    """All three operators, forward and backward, as a function without arguments."""
    graph, history, update, value = problem(make, size, 1, dtype=torch.float32)
    leaves = leaves_of(graph, history, update, value)
    edge, neighbors = (x[:1, :1].detach() for x in graph.dense())
    edge.requires_grad_()

    def run():
        outputs = [attend(graph, history, update, value, backend="native")]
        outputs += edge_readout(graph, history, scale=0.5, backend="native")
        outputs += edge_attention(
            update.query,
            update.key,
            value,
            edge,
            neighbors,
            gate=update.gate,
            edge_scale=0.5,
            backend="native",
        )
        total = sum((x.square().sum() for x in outputs), torch.zeros(()))
        return [*outputs, *torch.autograd.grad(total, [*leaves, edge])]

    return run


@pytest.mark.parametrize("size", [(9, 30, 8, 8, 8), (1, 700, 20, 4, 4)], ids=str)
def test_the_number_of_threads_changes_nothing(make, threads, size):
    run = everything(make, size)
    threads(1)
    expected = run()
    for number in (2, 3):
        threads(number)
        assert all(torch.equal(one, other) for one, other in zip(run(), expected, strict=True))


def test_several_python_threads_at_once(make, threads):
    threads(3)
    jobs = [everything(make, size) for size in ((9, 30, 8, 8, 8), (1, 300, 20, 4, 4), (3, 5, 4, 3, 3))]
    expected, wrong = [job() for job in jobs], []

    def work(index):
        for _ in range(10):
            if not all(torch.equal(a, b) for a, b in zip(jobs[index](), expected[index], strict=True)):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


WITHOUT_TORCH = """
import array, ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert "torch" not in sys.modules
own = not hasattr(ctypes.CDLL(None), "GOMP_parallel")
rows, columns = 20000, 7
values = array.array("f", ((i * 7919 % 10007) / 10007 for i in range(rows * columns)))
def split(threads):
    mask, count = bytearray(rows * columns), array.array("q", bytes(8 * rows))
    threshold = array.array("f", bytes(4 * rows))
    at = [ctypes.addressof((ctypes.c_char * 1).from_buffer(x)) for x in (values, mask, count, threshold)]
    native.otsu_cpu_float32(at[0], rows, columns, columns, 5, *at[1:], threads)
    return bytes(mask), bytes(count), bytes(threshold)
threads = lambda: len(__import__("os").listdir("/proc/self/task"))
one, alone = split(1), threads()
assert all(split(3) == one for _ in range(20))
print(own, threads() - alone)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_without_torch_the_pool_is_our_own():
    """What runs where torch brings no OpenMP: as many threads as asked for, and the same result."""
    done = run_python("-c", WITHOUT_TORCH, native._native.__file__)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "2"]


TORCHS_THREADS = """
import os, torch
from ecore_kernels import EmotionGraph, graph_attention
torch.set_num_threads(3)
torch.randn(2**22).exp()
before = len(os.listdir("/proc/self/task"))
graph = EmotionGraph(torch.rand(9, 30), torch.ones(9, 2, 30, dtype=torch.bool), torch.rand(9, 4), torch.rand(4, 4))
x = torch.randn(9, 2, 34, 8)
for _ in range(3):
    graph_attention(x, x, x, graph, backend="native")
print(before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.skipif(
    "openmp" not in torch.__config__.parallel_info().lower(), reason="torch has no OpenMP threads"
)
def test_torchs_own_threads_do_the_work():
    """No thread beside torch's, which spin for a while after each operation: they would share the cores."""
    done = run_python("-c", TORCHS_THREADS)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before == after


def _attend_in_child(arguments, sender):
    # Forward only: autograd's own threads do not survive a fork.
    with torch.no_grad():
        sender.send(float(attend(*arguments, backend="native").sum()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child(make, threads):
    """A child without the pool's threads works alone, as a DataLoader's worker does."""
    arguments = problem(make, (8, 20, 8, 8, 8), 1, dtype=torch.float32)
    threads(2)
    with torch.no_grad():
        want = float(attend(*arguments, backend="native").sum())
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_attend_in_child, args=(arguments, sender))
        child.start()
        answered = receiver.poll(30)
        got = receiver.recv() if answered else None
        child.kill()
        child.join()
        assert answered, "the forked child hung"
        assert got == want


def test_threads_take_turns_at_a_shared_edge(threads):
    """Several tiles a row and several parts a head, more (b, k) than threads."""
    leaves = [torch.randn(9, 3, 330, 4, requires_grad=True) for _ in range(3)]
    edge = torch.randn(1, 3, 330, 330, requires_grad=True)

    def run():
        output, _ = edge_attention(*leaves, edge, scale=0.5, backend="native")
        return torch.autograd.grad(output.square().sum(), [*leaves, edge])

    threads(1)
    expected = run()
    for number in (2, 6):
        threads(number)
        assert all(torch.equal(one, other) for one, other in zip(run(), expected, strict=True))


# Instruction sets, memory, refusals --------------------------------------------------------------------------


def run_python(*arguments, **environment):
    path = os.pathsep.join(p for p in sys.path if p)
    variables = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, cwd=ROOT
    )


OTHERS = native.simd()[1][:-1] if native.available() else []


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.skipif("ECORE_KERNELS_SIMD" in os.environ, reason="one instruction set is named already")
def test_other_instruction_set(name):
    """This file's tests on the kernels that would not be chosen here."""
    tests = (
        __file__,
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not python_threads and not forked and not memory",
    )
    done = run_python("-m", "pytest", *tests, ECORE_KERNELS_SIMD=name)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "from ecore_kernels.info import report; print(report())"
    assert f"simd: {name} (" in run_python("-c", code, ECORE_KERNELS_SIMD=name).stdout


def test_unknown_instruction_set():
    done = run_python("-c", "import ecore_kernels", ECORE_KERNELS_SIMD="mmx")
    assert done.returncode != 0
    expected = f"ValueError: ECORE_KERNELS_SIMD: expected one of {', '.join(native.simd()[1])} "
    assert expected in done.stderr
    assert "got 'mmx'" in done.stderr


def test_info_names_the_instruction_set():
    assert f"simd: {native.simd()[0]} (" in report()


PEAK = """
import resource, torch
from ecore_kernels import EdgeUpdate, EmotionGraph, edge_readout, graph_attention
words, emotions = 6000, 32
graph = EmotionGraph(torch.rand(1, words), torch.ones(1, 1, words, dtype=torch.bool), torch.rand(1, emotions),
                     torch.rand(emotions, emotions))
nodes = [torch.randn(1, 1, words + emotions, 4).requires_grad_() for _ in range(5)]
def run():
    history = [EdgeUpdate(*nodes[3:])]
    out = [graph_attention(*nodes[:3], graph, history, backend="native")]
    out += edge_readout(graph, history, backend="native")
    torch.autograd.grad(sum(x.square().sum() for x in out), nodes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_has_no_square_of_the_nodes():
    """One N x N matrix would take 145 MB."""
    done = run_python("-c", PEAK)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40_000


SHARED_PEAK = """
import resource, torch
from ecore_kernels import edge_attention
nodes = 1400
query, key, value = (torch.randn(8, 2, nodes, 2) for _ in range(3))
edge = torch.randn(1, 1, nodes, nodes, requires_grad=True)
torch.set_num_threads(2)
def run(query, key, value, edge):
    output, _ = edge_attention(query, key, value, edge, scale=0.5, backend="native")
    return torch.autograd.grad(output.sum(), edge)
run(*(x[:, :, :9] for x in (query, key, value)), edge[:, :, :9, :9])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(query, key, value, edge)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_of_a_shared_edge():
    """Its gradient takes 8 MB, and one for each of the 16 (b, k) that share it would take 125."""
    done = run_python("-c", SHARED_PEAK)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000


@pytest.mark.parametrize("receivers", ["all", "words"])
@pytest.mark.parametrize("size", [(2, 9, 6, 5, 7), (1, 330, 9, 4, 8)], ids=str)
def test_each_gradient_alone(make, size, receivers):
    """The same bits whoever else asks; what nobody asks for is not computed, so that it may be anything."""
    graph, history, update, value = problem(make, size, 1, dtype=torch.float32)
    leaves = leaves_of(graph, history, update, value)

    def gradients(asked):
        for x in leaves:
            x.requires_grad_(any(x is other for other in asked))
        output = attend(graph, history, update, value, receivers=receivers, backend="native")
        return torch.autograd.grad(output, asked, torch.ones_like(output))

    leaves = [x for x in leaves if x is not update.gate and x is not update.edge_scale]
    together = gradients(leaves)
    for leaf, expected in zip(leaves, together, strict=True):
        (alone,) = gradients([leaf])
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("edge_lead", [(2, 2), (1, 1)])
@pytest.mark.parametrize("nodes", [9, 330])
def test_each_gradient_of_a_dense_graph_alone(nodes, edge_lead):
    leaves = [torch.randn(2, 2, nodes, *last) for last in ((5,), (5,), (7,), ())]
    leaves.append(torch.randn(*edge_lead, nodes, nodes))
    neighbors = torch.rand(1, 2, nodes, nodes) > 0.5

    def gradients(asked):
        for x in leaves:
            x.requires_grad_(any(x is other for other in asked))
        query, key, value, gate, edge = leaves
        outputs = edge_attention(
            query, key, value, edge, neighbors, gate=gate, edge_scale=torch.ones(()), backend="native"
        )
        return torch.autograd.grad(sum(x.sum() for x in outputs), asked)

    together = gradients(leaves)
    for leaf, expected in zip(leaves, together, strict=True):
        (alone,) = gradients([leaf])
        assert torch.equal(alone, expected)


def test_refusals(make):
    graph, history, update, value = problem(make, (1, 3, 2, 2, 2), 1, dtype=torch.float32)

    def refused(message, graph=graph, history=history, update=update, value=value):
        with pytest.raises(RuntimeError, match=message):
            attend(graph, history, update, value, backend="native")

    low = torch.float8_e4m3fn
    refused("takes float16, bfloat16, float32, float64, not float8_e4m3fn", value=value.to(low))
    weighted = EmotionGraph(
        graph.word_weight.requires_grad_(), graph.word_mask, graph.emotion_weight, graph.correlation
    )
    refused("gives no gradient to word_weight", graph=weighted)
    with torch.no_grad():
        attend(weighted, history, update, value, backend="native")
    assert explain(graph_attention, update.query, update.key, value, weighted, history).startswith(
        "graph_attention: reference"
    )
    elsewhere = [x.to("meta") for x in (update.query, update.key, value)]
    assert "native: runs on CPU, not on meta" in explain(edge_attention, *elsewhere, torch.ones(()))
    nodes = [x.to(low) for x in (update.query, update.key)]
    with pytest.raises(RuntimeError, match=r"takes float16, .*, not float8_e4m3fn"):
        edge_readout(graph, [EdgeUpdate(*nodes)], backend="native")
