"""Checks of attention on general graphs: edge_attention with all its options, and sparse_attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import backends
from ecore_kernels.edge_list import EdgeList
from ecore_kernels.operators.edge_attention import edge_attention
from ecore_kernels.operators.sparse_attention import sparse_attention
from ecore_kernels.reference import kept_weights
from ecore_kernels.verify.call_check import TYPES, CallCheck

# Operator and variant. Calls of edge_attention have two options each, since every combination is another kernel to
# compile; those of sparse_attention differ in their tensors of edges.
EDGE_CALLS = (
    ("edge_attention", "bias, shared heads"),
    ("edge_attention", "rectangular, lse"),
    ("edge_attention", "dropout, sender gate"),
    ("edge_attention", "clamp, all pairs"),
    ("sparse_attention", ""),
    ("sparse_attention", "scalars"),
    ("sparse_attention", "vectors"),
)
SCALE = 0.25
BATCH, HEADS, DIM, VALUE_DIM = 2, 4, 20, 12
RECEIVERS, SENDERS, EDGES = 77, 53, 700
SMALL = {"BATCH": 1, "RECEIVERS": 5, "SENDERS": 4, "EDGES": 40}
"""Sizes for Triton's interpreter, which takes seconds where a GPU takes microseconds."""
DROPOUT, SEED, CLAMP = 0.3, 0x5EED, (-1.0, 1.5)
_VECTORS = ("key_scale", "key_offset", "value_offset")


@dataclasses.dataclass(frozen=True)
class EdgeCheck(CallCheck):
    """One call of an operator on edges.

    Attributes:
        small: True for the sizes of Triton's interpreter.
    """

    small: bool = False

    @property
    def size(self) -> int:
        """The number of receivers."""
        return self._size("RECEIVERS")

    def _size(self, name: str) -> int:
        return SMALL[name] if self.small and name in SMALL else globals()[name]

    @property
    def _pairs(self) -> tuple[int, int]:
        """Numbers of receivers and of senders."""
        rectangular = self.operator == "sparse_attention" or "rectangular" in self.variant
        return self._size("RECEIVERS"), self._size("SENDERS" if rectangular else "RECEIVERS")

    @functools.cached_property
    def edges(self) -> EdgeList:
        """The sparse graph: some receivers have no edges, one has many; the last edges are in it twice."""
        generator, count = torch.Generator().manual_seed(2), self._size("EDGES")
        receivers, senders = self._pairs
        receiver = torch.randint(1, receivers, (count,), generator=generator)
        receiver[: count // 3] = 1
        index = torch.stack([torch.randint(senders, (count,), generator=generator), receiver])
        index[:, -2] = index[:, -1]
        return EdgeList.from_edge_index(index, (senders, receivers)).to(self.device)

    @functools.cached_property
    def neighbors(self) -> Tensor:
        """[B, 1, Nq, Nk] bool; the first receiver has no neighbours."""
        generator = torch.Generator().manual_seed(1)
        heard = torch.rand(self._size("BATCH"), 1, *self._pairs, generator=generator) < 0.6
        heard[:, :, 0] = False
        return heard.to(self.device)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The leaves by name, and their outputs' gradients."""
        generator = torch.Generator().manual_seed(0)
        kind = TYPES.get(self.precision, torch.float32)
        weights = torch.promote_types(kind, torch.float32)  # of edges, gates and biases
        nodes, of_edges, outputs = self._shapes()
        shapes = nodes | of_edges | {f"upstream{i}": shape for i, shape in enumerate(outputs)}
        kinds = {name: kind if name in nodes or name in _VECTORS else weights for name in shapes}
        return {
            name: torch.randn(shape, generator=generator).to(self.device, kinds[name])
            for name, shape in shapes.items()
        }

    def _shapes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], list[tuple[int, ...]]]:
        """Shapes of nodes, of tensors of edges, and of outputs."""
        (receivers, senders), batch = self._pairs, self._size("BATCH")
        if self.operator == "sparse_attention":
            nodes: dict[str, tuple[int, ...]] = {
                "query": (receivers, HEADS, DIM),
                "key": (senders, HEADS, DIM),
                "value": (senders, HEADS, VALUE_DIM),
            }
            count = self._size("EDGES")
            scalars = {"edge": (count, HEADS), "bias": (count, HEADS)}
            rows = dict.fromkeys(_VECTORS[:2], (count, HEADS, DIM))
            vectors = {**rows, _VECTORS[2]: (count, HEADS, VALUE_DIM)}
            chosen: dict[str, dict[str, tuple[int, ...]]] = {
                "": {},
                "scalars": {**scalars},
                "vectors": {**vectors},
            }
            return nodes, chosen[self.variant], [(receivers, HEADS, VALUE_DIM)]
        kept = 2 if "shared heads" in self.variant else HEADS
        full = (batch, HEADS, receivers, senders)
        nodes = {
            "query": (batch, HEADS, receivers, DIM),
            "key": (batch, kept, senders, DIM),
            "value": (batch, kept, senders, VALUE_DIM),
        }
        of_edges: dict[str, tuple[int, ...]] = {"edge": full}
        outputs: list[tuple[int, ...]] = [(*full[:3], VALUE_DIM)]
        if "bias" in self.variant:
            of_edges["bias"] = (1, *full[1:])  # of which its gradient is a sum
        if "sender gate" in self.variant:
            of_edges["sender_gate"] = (batch, HEADS, senders)
        if "lse" not in self.variant:
            of_edges |= {"gate": full[:3], "edge_scale": (), "edge_bias": ()}
            outputs.append(full)
        else:
            outputs.append(full[:3])
        return nodes, of_edges, outputs

    def refusals(self, backend: str) -> list[str]:
        """Return the reasons why a backend cannot run the call."""
        given = {n: x for n, x in self.tensors.items() if not n.startswith("upstream")}
        graph = (
            {"edges": self.edges} if self.operator == "sparse_attention" else {"neighbors": self.neighbors}
        )
        return backends.BACKENDS[backend].why_not(self.operator, **{**given, **graph})

    def outputs(self, leaves: dict[str, Tensor], backend: str | None) -> list[Tensor]:
        """Outputs of the operator on a backend; with None, of its formula in the tensors' type."""
        if self.operator == "sparse_attention":
            return self._plain_sparse(leaves) if backend is None else self._sparse(leaves, backend)
        return self._plain_dense(**leaves) if backend is None else self._dense(leaves, backend)

    @property
    def _options(self) -> dict[str, Any]:
        options: dict[str, dict[str, Any]] = {
            "rectangular, lse": {"return_lse": True},
            "dropout, sender gate": {"dropout": DROPOUT, "seed": SEED},
            "clamp, all pairs": {"clamp": CLAMP, "update": "all"},
        }
        return options.get(self.variant, {})

    def _dense(self, leaves: dict[str, Any], backend: str) -> list[Tensor]:
        given: dict[str, Any] = {**leaves, "neighbors": self.neighbors, **self._options}
        output, new_edge, *lse = edge_attention(**given, scale=SCALE, backend=backend)
        # An lse of -inf, of a receiver without neighbours, has no error.
        heard = [x.masked_fill(~self._hears, 0.0) for x in lse]
        return [output, *([] if new_edge is None else [new_edge]), *heard]

    @property
    def _hears(self) -> Tensor:
        return self.neighbors.any(-1)

    def _plain_dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        edge: Tensor,
        bias: Tensor | None = None,
        sender_gate: Tensor | None = None,
        gate: Tensor | None = None,
        edge_scale: Tensor | None = None,
        edge_bias: Tensor | None = None,
    ) -> list[Tensor]:
        """The formula of docs/edge-attention.md."""
        key, value = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))
        score = SCALE * (query @ key.mT)  # [B, H, Nq, Nk]
        score = (score.clamp(*CLAMP) if "clamp" in self.variant else score) * edge
        score = score if sender_gate is None else score * sender_gate[:, :, None]
        logits = score if bias is None else score + bias
        logits = logits.masked_fill(~self.neighbors, torch.finfo(logits.dtype).min)
        weight = logits.softmax(-1).masked_fill(~self.neighbors, 0.0)
        if "dropout" in self.variant:
            seed = torch.tensor(SEED, device=query.device)
            weight = weight * kept_weights(seed, DROPOUT, tuple(weight.shape), weight.dtype)
        outputs = [(weight.to(value.dtype) @ value)]
        if gate is not None and edge_scale is not None and edge_bias is not None:
            new_edge = gate[..., None] * edge_scale * (edge + score) + edge_bias
            outputs.append(
                new_edge if "all pairs" in self.variant else new_edge.masked_fill(~self.neighbors, 0.0)
            )
        if "lse" in self.variant:
            outputs.append(logits.logsumexp(-1).masked_fill(~self._hears, 0.0))
        return outputs

    def _sparse(self, leaves: dict[str, Any], backend: str) -> list[Tensor]:
        return [sparse_attention(**leaves, edges=self.edges, scale=SCALE, backend=backend)]

    def _plain_sparse(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        """The formula of docs/sparse-attention.md, on all pairs of a receiver and an edge: exact, and small enough."""
        sender, receiver = self.edges.sender, self.edges.receiver
        key, value = leaves["key"][sender], leaves["value"][sender]  # [E, H, d]
        if "key_scale" in leaves:
            key = key * leaves["key_scale"] + leaves["key_offset"]
            value = value + leaves["value_offset"]
        score = SCALE * (leaves["query"][receiver] * key).sum(-1)  # [E, H]
        if "edge" in leaves:
            score = score * leaves["edge"] + leaves["bias"]
        hears = torch.arange(self._pairs[0], device=receiver.device)[:, None] == receiver  # [N, E]
        logits = score.T[:, None].expand(-1, *hears.shape)  # [H, N, E]
        logits = logits.masked_fill(~hears, torch.finfo(logits.dtype).min)
        weight = logits.softmax(-1).masked_fill(~hears, 0.0)
        return [(weight.to(value.dtype) @ value.transpose(0, 1)).transpose(0, 1)]
