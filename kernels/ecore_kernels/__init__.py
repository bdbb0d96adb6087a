"""Fused operators for the multi-resolution emotion graph of E-CORE: attention with learned, updated edge weights."""

import ecore_kernels.batching  # noqa: F401, registers its rules
from ecore_kernels.attention import EdgeUpdate, edge_attention, graph_attention
from ecore_kernels.backends import available_backends, explain, use_backend
from ecore_kernels.graph import EmotionGraph
from ecore_kernels.module import MultiResolutionEdgeAttention
from ecore_kernels.otsu import OtsuSplit, otsu
from ecore_kernels.readout import edge_readout

__all__ = [
    "EdgeUpdate",
    "EmotionGraph",
    "MultiResolutionEdgeAttention",
    "OtsuSplit",
    "available_backends",
    "edge_attention",
    "edge_readout",
    "explain",
    "graph_attention",
    "otsu",
    "use_backend",
]
