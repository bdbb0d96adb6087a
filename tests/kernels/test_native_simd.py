"""The C++ kernels on every instruction set, and the memory that they take."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import pytest

from ecore_kernels import (
    native,
)
from ecore_kernels.info import report
from tests.kernels.native_problems import run_python

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled extension is missing")

# What runs in one process is for one worker: pytest -n 2 --dist loadgroup.
OTHERS = [
    pytest.param(name, marks=pytest.mark.xdist_group(name))
    for name in (native.simd()[1][:-1] if native.available() else [])
]


SELECTIONS = {
    "kernels": (
        ("native_kernels", "native_threads", "native_simd"),
        "not python_threads and not forked and not memory and not unknown",
    ),
    "words": (
        ("dropout_add_layer_norm", "edge_options"),
        "native and (test_results_and_gradients or TestDropout)",
    ),
    "sequences": (
        ("varlen_attention", "varlen_attention_apart"),
        "test_attention_of or test_attention_to or test_widths or not_finite",
    ),
}
"""Parts of this folder's tests, and of these a choice, that each instruction set passes."""

SELECTIONS_AND_REPORT = """
import contextlib, io, json, sys
import pytest
from ecore_kernels.info import report

results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments])
    results[name] = int(code), printed.getvalue()
print(json.dumps([results, report()]))
"""


@functools.cache
def results(instruction_set: str) -> tuple[dict[str, tuple[int, str]], str]:
    """Run all selections on an instruction set, in one process of its own: one import of torch.

    Returns:
        by selection pytest's exit code and what it printed; and the report on the package.
    """
    selections = {
        name: [*(str(Path(__file__).parent / f"test_{part}.py") for part in parts), "-k", keyword]
        for name, (parts, keyword) in SELECTIONS.items()
    }
    done = run_python("-c", SELECTIONS_AND_REPORT, json.dumps(selections), ECORE_KERNELS_SIMD=instruction_set)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(selection: str, instruction_set: str) -> None:
    by_selection, report = results(instruction_set)
    code, printed = by_selection[selection]
    assert code == 0, printed
    assert f"simd: {instruction_set} (" in report


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.skipif("ECORE_KERNELS_SIMD" in os.environ, reason="one instruction set is named already")
def test_other_instruction_set(name):
    """These and the other files' tests on the kernels that would not be chosen here."""
    check("kernels", name)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.skipif("ECORE_KERNELS_SIMD" in os.environ, reason="one instruction set is named already")
def test_other_instruction_set_draws_the_same_words(name):
    """Random words are drawn in vectors; the reference draws them in PyTorch."""
    check("words", name)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.skipif("ECORE_KERNELS_SIMD" in os.environ, reason="one instruction set is named already")
def test_other_instruction_set_attends_inside_sequences(name):
    check("sequences", name)


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
