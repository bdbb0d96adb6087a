"""Exported programs: torch.export, saved and loaded, and AOTInductor on a CPU."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ecore_kernels import EdgeUpdate, EmotionGraph, MultiResolutionEdgeAttention, edge_readout
from ecore_kernels.nn import EdgeTransformerLayer

WORDS, EMOTIONS, DIM, RESOLUTIONS = 6, 3, 8, 2


class TwoLayers(nn.Module):
    """Two layers and what is read out of their edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MultiResolutionEdgeAttention(DIM, RESOLUTIONS)
        self.second = MultiResolutionEdgeAttention(DIM, RESOLUTIONS)

    def forward(self, nodes, graph):
        nodes, one = self.first(nodes, graph)
        nodes, other = self.second(nodes, graph, [one])
        return nodes, other, edge_readout(graph, [one, other])


def inputs(batch: int) -> tuple[torch.Tensor, EmotionGraph]:
    """Nodes and their graph."""
    intensity, lengths = torch.rand(batch, WORDS), torch.full((batch,), WORDS - 1)
    correlation = torch.randn(EMOTIONS, EMOTIONS).softmax(-1)
    graph = EmotionGraph.from_intensity(intensity, lengths, (0.0, 0.3), correlation)
    return torch.randn(batch, WORDS + EMOTIONS, DIM), graph


def check_equal(actual, expected) -> None:
    """Compare every tensor of two results, which are made of the same classes."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export_save_load(dynamic, strict, caplog):
    if dynamic and strict and torch.__version__ < (2, 8):
        pytest.skip(
            "torch 2.7's strict export takes no autograd function, not even x * 2, where a size is free"
        )
    module = TwoLayers()
    batch = torch.export.Dim("batch", min=1, max=64)
    sizes = {0: batch}
    shapes = (sizes, [sizes, sizes, sizes, None, None]) if dynamic else None
    program = torch.export.export(module, inputs(2), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert "weights_only" not in caplog.text  # loaded without a fallback to what may run code
    for size in (2, 5, 1) if dynamic else (2,):
        given = inputs(size)
        found = loaded(*given)
        check_equal(found, module(*given))
        assert isinstance(found[1], EdgeUpdate)


def test_export_with_any_number_of_nodes():
    """Without a bound on it: no layout of a result makes torch.export ask for one."""
    module = EdgeTransformerLayer(DIM, 2, 4).eval()
    batch, nodes = torch.export.Dim("batch"), torch.export.Dim("nodes")

    def given(batch: int, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, nodes, DIM), torch.randn(batch, nodes, nodes, 4)

    shapes = ({0: batch, 1: nodes}, {0: batch, 1: nodes, 2: nodes})
    program = torch.export.export(module, given(2, 5), dynamic_shapes=shapes)
    for sizes in ((2, 5), (3, 9)):
        tensors = given(*sizes)
        check_equal(program.module()(*tensors), module(*tensors))


class Apart(nn.Module):
    """A layer without a history, and :class:`TwoLayers`: one program, as compiling takes most of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = MultiResolutionEdgeAttention(DIM, RESOLUTIONS), TwoLayers()

    def forward(self, nodes, graph):
        return self.one(nodes, graph), self.two(nodes, graph)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    """Without a history, too, whose empty list of tensors arrives as None."""
    given, module = inputs(2), Apart()
    with torch.no_grad():
        program = torch.export.export(module, given)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "apart.pt2"))
        found = torch._inductor.aoti_load_package(package)(*given)
        check_equal(found, module(*given))
