"""Problems for the C++ kernels, and what they ask gradients of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from ecore_kernels import (
    graph_attention,
)

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


def run_python(*arguments, **environment):
    path = os.pathsep.join(p for p in sys.path if p)
    variables = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, cwd=ROOT
    )
