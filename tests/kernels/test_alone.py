"""The operators need torch alone: they import and run where the packages of the dialogue model are missing."""

import subprocess
import sys

import pytest
import torch

from ecore_kernels.tracing import constant_result

MODEL_PACKAGES = (
    "ecore",
    "nltk",
    "vaderSentiment",
    "tensorboard",
    "safetensors",
    "tqdm",
    "transformers",
    "matplotlib",
    "scipy",
)

OPERATORS = """
import contextlib, sys

for name in {missing!r}:
    sys.modules[name] = None  # what Python takes for a package that is not there

import torch
import ecore_kernels
from ecore_kernels import EdgeUpdate, EmotionGraph, MultiResolutionEdgeAttention

words, emotions, dim = 5, 3, 4
intensity = torch.rand(2, words)
weight = torch.rand(2, emotions, requires_grad=True)
correlation = torch.rand(emotions, emotions).softmax(-1)
graph = EmotionGraph.from_intensity(intensity, torch.tensor([words, 4]), [0.0, 0.1], correlation, weight)
query, key, value = (torch.randn(2, 2, words + emotions, dim, requires_grad=True) for _ in range(3))
gate, edge_scale = torch.randn(2, 2, words + emotions, requires_grad=True), torch.ones((), requires_grad=True)
history = [EdgeUpdate(query, key, gate, edge_scale)]


def backward(*outputs):
    sum(output.sum() for output in outputs).backward()


for backend in (contextlib.nullcontext(), ecore_kernels.use_backend("reference")):
    with backend:
        output, new_edge = ecore_kernels.edge_attention(
            query, key, value, *graph.dense(), gate=gate, edge_scale=edge_scale
        )
        backward(output, new_edge)
        backward(ecore_kernels.graph_attention(query, key, value, graph, history))
        backward(*ecore_kernels.edge_readout(graph, history))
        assert ecore_kernels.otsu(torch.rand(2, 7)).mask.any(1).all()
        layer = MultiResolutionEdgeAttention(2 * dim, 2)
        nodes, update = layer(torch.randn(2, words + emotions, 2 * dim), graph)
        backward(nodes, update.gate)
for name, leaf in dict(query=query, key=key, value=value, gate=gate, edge_scale=edge_scale, weight=weight).items():
    assert leaf.grad is not None and bool(leaf.grad.abs().sum() > 0), name
"""


COMMANDS = """
import sys

sys.modules.update(dict.fromkeys({missing!r}))
import ecore_kernels.info, ecore_kernels.problems, ecore_kernels.verify
"""


@pytest.mark.parametrize("code", [OPERATORS, COMMANDS], ids=["operators", "commands"])
def test_operators_run_without_the_models_packages(code):
    command = [sys.executable, "-c", code.format(missing=MODEL_PACKAGES)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_leaves_torchs_compiler_alone():
    """It takes as long to import as all else together; who compiles, pays."""
    code = "import sys, ecore_kernels, ecore.pipeline, ecore.training.trainer; print('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


def test_a_constant_result_is_marked_as_torch_marks_it():
    def ours():
        pass

    def torchs():
        pass

    assert vars(constant_result(ours)) == vars(torch.compiler.assume_constant_result(torchs))
