"""Fused operators: attention with learned, updated edge weights (the emotion graph of E-CORE), and parts of a step."""

from ecore_kernels.backends import available_backends, explain, use_backend
from ecore_kernels.edge_list import EdgeList
from ecore_kernels.graph import EmotionGraph
from ecore_kernels.module import MultiResolutionEdgeAttention
from ecore_kernels.operators.dropout_add_layer_norm import dropout_add_layer_norm
from ecore_kernels.operators.edge_attention import edge_attention
from ecore_kernels.operators.edge_readout import edge_readout
from ecore_kernels.operators.graph_attention import graph_attention
from ecore_kernels.operators.history import EdgeUpdate
from ecore_kernels.operators.linear_cross_entropy import linear_cross_entropy
from ecore_kernels.operators.otsu import OtsuSplit, otsu
from ecore_kernels.operators.quantized_linear import quantized_linear, quantized_linear_argmax
from ecore_kernels.operators.sparse_attention import sparse_attention
from ecore_kernels.operators.varlen_attention import varlen_attention
from ecore_kernels.quantized import QuantizedLinear
from ecore_kernels.sequences import Sequences

__all__ = [
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
]
