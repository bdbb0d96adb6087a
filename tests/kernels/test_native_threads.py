"""The C++ kernels' threads: their number changes nothing, and other threads and children do no harm."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from ecore_kernels import (
    Sequences,
    edge_attention,
    edge_readout,
    native,
    varlen_attention,
)
from tests.kernels.forking import in_forked_child, needs_fork
from tests.kernels.native_problems import attend, leaves_of, problem, run_python

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled extension is missing")


@pytest.fixture
def threads():
    """Sets torch's number of threads, which the extension follows, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(make, size):
    """Attention on graphs and inside sequences, and the readout, forward and backward, without arguments."""
    graph, history, update, value = problem(make, size, 1, dtype=torch.float32)
    leaves = leaves_of(graph, history, update, value)
    edge, neighbors = (x[:1, :1].detach() for x in graph.dense())
    edge.requires_grad_()
    batch, _, nodes, _ = update.query.shape
    sequences = Sequences.from_lengths([nodes] * batch)

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
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (update.query, update.key, value)]  # [B * N, K, d]
        outputs.append(varlen_attention(*rows, sequences, causal=True, backend="native"))
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
    """The pool of a torch without OpenMP: as many threads as asked for, and the same result."""
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


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child(make, threads):
    """A child without the pool's threads works alone, as a DataLoader's worker does."""
    arguments = problem(make, (8, 20, 8, 8, 8), 1, dtype=torch.float32)
    threads(2)

    @torch.no_grad()  # forward only: autograd's own threads do not survive a fork
    def sum_of_outputs() -> float:
        return float(attend(*arguments, backend="native").sum())

    want = sum_of_outputs()
    for _ in range(3):
        assert in_forked_child(sum_of_outputs) == want


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
