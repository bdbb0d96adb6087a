"""The choice among backends, and what they say when they refuse."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import ecore_kernels
from ecore_kernels import (
    EdgeUpdate,
    EmotionGraph,
    available_backends,
    backends,
    edge_attention,
    edge_readout,
    explain,
    graph_attention,
    native,
    otsu,
    triton_kernels,
    use_backend,
)
from ecore_kernels.backends import Backend, named
from tests import forked


@pytest.fixture
def fussy(monkeypatch):
    """A third backend before the others: it refuses otsu of more than four columns, for two reasons."""

    def refuse(values=None, *_, **__):
        return ["is moody", "takes at most 4 columns"] if values is not None and values.shape[1] > 4 else []

    monkeypatch.setattr(
        backends,
        "BACKENDS",
        {"fussy": Backend("fussy", {"otsu": refuse}), "reference": backends.BACKENDS["reference"]},
    )


@pytest.mark.usefixtures("fussy")
def test_the_first_that_can_run_is_chosen():
    assert backends.choose("otsu", None, torch.zeros(2, 4)) == "fussy"
    assert backends.choose("otsu", None, torch.zeros(2, 5)) == "reference"
    assert backends.choose("edge_attention", None) == "reference"
    assert backends.choose("otsu", "reference", torch.zeros(2, 4)) == "reference"
    assert available_backends() == ("fussy", "reference")


@pytest.mark.usefixtures("fussy")
def test_a_named_backend_that_cannot_run_says_every_reason():
    with pytest.raises(
        RuntimeError, match=r"otsu: backend 'fussy' cannot .* is moody; .*takes at most 4 columns"
    ):
        otsu(torch.zeros(2, 5), backend="fussy")
    x = torch.zeros(1, 1, 2, 2)
    with use_backend("fussy"), pytest.raises(RuntimeError, match="has no edge_attention kernel"):
        edge_attention(x, x, x, torch.ones(()))


@pytest.mark.usefixtures("fussy")
def test_explain():
    lines = explain(otsu, torch.zeros(2, 5)).splitlines()
    assert lines[0] == "otsu: reference"
    assert lines[1].strip() == "fussy: is moody; takes at most 4 columns"
    assert lines[2].strip() == "reference: runs this call"
    lines = explain("otsu").splitlines()
    assert lines[0] == "otsu: fussy"
    assert "could run it, but fussy comes first" in lines[2]
    lines = explain("otsu", torch.zeros(2, 3), max_relevant=5, backend="reference").splitlines()
    assert lines[0] == "otsu: reference"
    assert "could run it, but reference is named" in lines[1]
    assert "runs this call (named)" in lines[2]
    with use_backend("fussy"):
        assert explain("edge_readout").splitlines()[0] == "edge_readout: no backend can run this call"


def test_explain_speaks_of_every_backend():
    for operator in (
        ecore_kernels.edge_attention,
        ecore_kernels.graph_attention,
        ecore_kernels.edge_readout,
        otsu,
    ):
        text = explain(operator)
        assert text.startswith(operator.__name__ + ": ")
        for name in ("triton", "native", "reference"):
            assert f"  {name}: " in text
    assert "triton: has no otsu kernel" in explain("otsu")


@pytest.mark.skipif(not native.available(), reason="the compiled extension is missing")
def test_explain_looks_at_the_types_that_autocast_makes():
    update = EdgeUpdate(*torch.zeros(2, 1, 1, 4, 2, dtype=torch.bfloat16))
    graph = EmotionGraph.from_intensity(torch.rand(1, 2), torch.tensor([2]), (0.0,), torch.eye(2))
    nodes = (update.query, update.key, update.key)
    for operator, arguments in (
        ("edge_attention", (*nodes, torch.ones(()))),
        ("graph_attention", (*nodes, graph, [update])),
        ("edge_readout", (graph, [update])),
    ):
        refusal = "gets bfloat16 wrong" if triton_kernels.INTERPRETED else "CUDA"
        assert refusal in explain(operator, *arguments, backend="triton")
        with torch.autocast("cpu", torch.bfloat16):
            said = explain(operator, *arguments, backend="triton")
            assert said.startswith(f"{operator}: triton") == triton_kernels.INTERPRETED


def test_unknown_names():
    for call in (
        lambda: use_backend("cuda"),
        lambda: otsu(torch.zeros(2, 3), backend="cuda"),
        lambda: explain("otsu", backend="cuda"),
    ):
        with pytest.raises(ValueError, match="expected one of triton, native, reference, got 'cuda'"):
            call()
    with pytest.raises(ValueError, match=r"expected one of edge_attention, .*, got 'softmax'"):
        explain("softmax")


def test_use_backend_nests_and_restores():
    before = named()
    with use_backend("reference"):
        assert named() == "reference"
        with use_backend("native"):
            assert named() == "native"
        assert named() == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            raise ZeroDivisionError
        assert named() == "reference"
    assert named() == before


def test_one_use_backend_entered_twice():
    before, again = named(), use_backend("reference")
    with again:
        with again:
            pass
        assert named() == "reference"
    assert named() == before


def test_threads_name_their_own_backend():
    """Two threads that enter and leave in turn, and a third that names nothing."""
    before = named()
    inside, left = threading.Barrier(3, timeout=10), threading.Barrier(3, timeout=10)

    def work(name):
        with use_backend(name):
            inside.wait()
            seen = named()
            if name == "native":
                left.wait()
        if name == "reference":
            left.wait()
        return seen, named()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = [pool.submit(work, name) for name in ("native", "reference")]
        inside.wait()
        assert named() == before
        left.wait()
        assert [x.result() for x in found] == [("native", before), ("reference", before)]
    assert named() == before


def test_a_thread_that_names_nothing_is_left_alone():
    """It would fail if it heard of a backend that has no kernel for its call."""
    values = torch.zeros(2, 3)
    with use_backend("triton"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(otsu, values).result()


def test_use_backend_decorates():
    before = named()

    @use_backend("reference")
    def inner(again):
        seen = named()
        if again:
            assert inner(False) == "reference"
        return seen

    assert inner(True) == "reference"
    assert named() == before
    assert inner.__name__ == "inner"


@pytest.mark.usefixtures("fresh_compile")
def test_use_backend_inside_of_compiled_code():
    """Traced under fullgraph, and left as it was."""

    def function(values):
        with use_backend("reference"):
            chosen = otsu(values).mask
        return chosen, named()

    before, values = named(), torch.randn(3, 8)
    mask, after = torch.compile(function, fullgraph=True, backend="aot_eager")(values)
    assert torch.equal(mask, otsu(values).mask)
    assert after == named() == before


def test_explain_checks_a_call_as_the_operator_does():
    update = EdgeUpdate(*torch.zeros(2, 1, 1, 4, 2))
    graph = EmotionGraph.from_intensity(torch.rand(1, 2), torch.tensor([2]), (0.0,), torch.eye(2))
    nodes = (update.query, update.key, update.key)
    for arguments, message in (
        (nodes, r"explain: graph_attention: missing a required argument: 'graph', in \(query"),
        ((*nodes, None), "graph_attention: graph: expected an EmotionGraph, got NoneType"),
        (
            (*nodes, graph, update),
            r"history: expected a sequence of EdgeUpdate, got a single one: \[update\]",
        ),
        ((*nodes, graph, [tuple(update)]), r"history\[0\]: expected EdgeUpdate\(query, .*, got tuple"),
        ((*nodes, graph, 3), "history: expected a sequence of EdgeUpdate, got int"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            explain("graph_attention", *arguments)
        assert "\n" not in str(error.value)
        if len(arguments) > 3:
            with pytest.raises(ValueError, match=message):
                graph_attention(*arguments)
    with pytest.raises(ValueError, match="edge_readout: history: expected a sequence"):
        edge_readout(graph, update)


def test_a_backend_of_the_call_beats_use_backend():
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="'triton'"):
            otsu(torch.zeros(2, 3))
        otsu(torch.zeros(2, 3), backend="reference")


def test_reference_is_always_there():
    assert available_backends()[-1] == "reference"
    assert ("triton" in available_backends()) == (not triton_kernels.unavailable_reason())


@pytest.mark.skipif(not triton_kernels.INTERPRETED, reason="Triton's interpreter is not in use")
def test_the_interpreter_runs_only_where_it_is_named(monkeypatch):
    assert backends.choose("graph_attention", None) != "triton"
    lines = explain("graph_attention").splitlines()
    assert lines[1].strip() == "triton: could run it, but only where it is named"
    assert explain("graph_attention", backend="triton").startswith("graph_attention: triton")
    x = torch.zeros(1, 1, 2, 2)
    low = x.bfloat16()
    assert "gets bfloat16 wrong" in explain("edge_attention", low, low, low, torch.ones(()))
    monkeypatch.setattr(triton_kernels, "_version", lambda: (3, 5))
    for kind, most in ((torch.float32, 256), (torch.float64, 128)):
        wide = torch.zeros(1, 1, 2, most + 1, dtype=kind)
        with pytest.raises(RuntimeError, match=f"heads of float.. up to {most} wide, not {most + 1}"):
            edge_attention(wide, wide, wide, torch.ones(()), backend="triton")
    monkeypatch.setattr(triton_kernels, "_version", lambda: (3, 4))
    double = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    assert "needs Triton 3.5 or newer for float64" in explain(
        "edge_attention", double, double, double, double
    )


@pytest.mark.skipif(not triton_kernels.INTERPRETED, reason="Triton's interpreter is not in use")
@pytest.mark.parametrize(
    ("kind", "head", "attention", "readout"),
    [
        (torch.float16, 256, 3, 4),
        (torch.float32, 128, 3, 4),
        (torch.float32, 129, 2, 2),
        (torch.float64, 64, 3, 4),
        (torch.float64, 65, 2, 2),
    ],
)
def test_triton_refuses_histories_that_do_not_fit(kind, head, attention, readout):
    graph = EmotionGraph(
        torch.ones(1, 1), torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(1, 1), torch.ones(1, 1)
    )
    nodes = torch.ones(1, 1, 2, head, dtype=kind)
    update = EdgeUpdate(nodes, nodes)
    for depth in range(1, readout + 2):
        said = explain("graph_attention", nodes, nodes, nodes, graph, [update] * depth, backend="triton")
        assert (f"takes at most {attention} layers of history" in said) == (depth > attention)
        assert said.startswith("graph_attention: triton") == (depth <= attention)
        said = explain("edge_readout", graph, [update] * depth, backend="triton")
        assert (f"takes at most {readout} layers of history" in said) == (depth > readout)
    # Weights of float64 make float64 of it all.
    weights = [torch.ones(1, 1), torch.ones(1, 1, dtype=torch.float64)]
    for one, other in (weights, weights[::-1]):
        double = EmotionGraph(torch.ones(1, 1), torch.ones(1, 1, 1, dtype=torch.bool), one, other)
        said = explain("graph_attention", nodes, nodes, nodes, double, backend="triton")
        assert said.startswith("graph_attention: triton") == (head <= 128)
        said = explain("edge_readout", double, [update] * 3, backend="triton")
        assert said.startswith("edge_readout: triton") == (head <= 64)
    for edge, gate in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        gates = {"gate": torch.ones(1, 1, 2, dtype=gate), "edge_scale": 1.0}
        said = explain(
            "edge_attention", nodes, nodes, nodes, torch.ones((), dtype=edge), **gates, backend="triton"
        )
        assert said.startswith("edge_attention: triton") == (head <= 128)
    # A wide value counts as a wide query does.
    value = torch.ones(1, 1, 2, 2 * head, dtype=kind)
    assert "layers of history with heads of" in explain(
        "graph_attention", nodes, nodes, value, graph, [update] * 3, backend="triton"
    )


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_tensors_on_two_devices_are_refused(backend):
    if backend not in available_backends():
        pytest.skip(f"{backend} does not run here")
    nodes = torch.ones(1, 1, 2, 4)
    graph = EmotionGraph(
        torch.ones(1, 1),
        torch.ones(1, 1, 1, dtype=torch.bool, device="meta"),
        torch.ones(1, 1),
        torch.ones(1, 1),
    )
    said = "all tensors on one device, got cpu and meta"
    with pytest.raises(ValueError, match=said):
        graph_attention(nodes, nodes, nodes, graph, backend=backend)
    with pytest.raises(ValueError, match=said):
        edge_attention(nodes, nodes, nodes, torch.ones(2, 2, device="meta"), backend=backend)
    with pytest.raises(ValueError, match="all tensors on one device, got meta and cpu"):
        edge_readout(graph, [EdgeUpdate(nodes, nodes)], backend=backend)


@pytest.fixture
def reasons_afresh():
    """Reasons are asked for once a process."""
    caches = triton_kernels._unavailable_reason, triton_kernels._version
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("reasons_afresh")
def test_what_keeps_triton_from_a_gpu_is_a_reason(monkeypatch):
    triton = pytest.importorskip("triton")

    class Broken:
        def get_current_target(self):
            raise RuntimeError("Failed to find\nC compiler")

    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Broken()))
    assert triton_kernels._unavailable_reason() == "cannot start Triton's driver: Failed to find C compiler"
    # Distributions of other names and with a suffix.
    monkeypatch.setattr(triton, "__version__", "3.2.0+gitabc")
    triton_kernels._unavailable_reason.cache_clear()
    triton_kernels._version.cache_clear()
    assert triton_kernels._unavailable_reason() == "needs Triton 3.3 or newer, not 3.2"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    triton_kernels._unavailable_reason.cache_clear()
    assert triton_kernels._unavailable_reason() == "runs on NVIDIA GPUs only"


@pytest.mark.usefixtures("fresh_compile")
def test_use_backend_around_compiled_code():
    """A compiled function follows the choice: it is guarded, not baked in."""
    compiled = torch.compile(lambda x: otsu(x).mask, fullgraph=True, backend="aot_eager")
    values = torch.randn(3, 8)
    expected = compiled(values)
    with use_backend("reference"):
        assert torch.equal(compiled(values), expected)
    # torch 2.7's Dynamo says of an exception only that it observed one.
    with use_backend("triton"), pytest.raises(Exception, match=r"has no otsu kernel|Observed exception"):
        compiled(values)
    assert torch.equal(compiled(values), expected)


def run_python(code: str, backend: str) -> subprocess.CompletedProcess:
    """Run ``code`` where ECORE_KERNELS_BACKEND is ``backend``."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"ECORE_KERNELS_BACKEND": backend, "PYTHONPATH": path}
    return forked.run(code, environment)


@pytest.mark.parametrize(
    "backend, output",
    [
        ("reference", "otsu: reference"),
        ("triton", "otsu: no backend can run this call"),
    ],
)
def test_environment_variable(backend, output):
    done = run_python("import ecore_kernels as e; print(e.explain('otsu').splitlines()[0])", backend)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == output


def test_environment_variable_unknown():
    done = run_python("import ecore_kernels", "cuda")
    assert done.returncode != 0
    assert (
        "ValueError: ECORE_KERNELS_BACKEND: expected one of triton, native, reference, got 'cuda'"
        in done.stderr
    )


def test_public_face():
    assert set(ecore_kernels.__all__) == {
        "EdgeList",
        "EdgeUpdate",
        "EmotionGraph",
        "MultiResolutionEdgeAttention",
        "OtsuSplit",
        "QuantizedLinear",
        "Sequences",
        "available_backends",
        "dropout_add_layer_norm",
        "edge_attention",
        "edge_readout",
        "explain",
        "graph_attention",
        "linear_cross_entropy",
        "otsu",
        "quantized_linear",
        "quantized_linear_argmax",
        "sparse_attention",
        "use_backend",
        "varlen_attention",
    }
    assert all(getattr(ecore_kernels, name).__doc__ for name in ecore_kernels.__all__)
