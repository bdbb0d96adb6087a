"""Checks of attention inside sequences: varlen_attention, in every form that its tensors may have."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ecore_kernels import backends
from ecore_kernels.operators.varlen_attention import varlen_attention
from ecore_kernels.sequences import Sequences
from ecore_kernels.verify.call_check import TYPES, CallCheck

# Operator and variant: queries, keys and values side by side; the same, causal; keys and values of other sequences.
SEQUENCE_CALLS = (
    ("varlen_attention", ""),
    ("varlen_attention", "causal"),
    ("varlen_attention", "other keys"),
)
LENGTHS, KEY_LENGTHS = (77, 0, 330, 5), (12, 3, 90, 0)
HEADS, DIM = 2, 20
SCALE = 0.25


@dataclasses.dataclass(frozen=True)
class SequenceCheck(CallCheck):
    """One call of an operator on sequences."""

    @property
    def size(self) -> int:
        """The number of rows."""
        return sum(LENGTHS)

    @property
    def _key_lengths(self) -> tuple[int, ...]:
        return KEY_LENGTHS if self.variant == "other keys" else LENGTHS

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The leaves by name, and the output's gradient."""
        generator = torch.Generator().manual_seed(0)
        kind = TYPES.get(self.precision, torch.float32)
        shapes: dict[str, tuple[int, ...]] = {"query": (self.size, 3, HEADS, DIM)}
        if self.variant == "other keys":
            shapes = {"query": (self.size, HEADS, DIM), "key": (sum(KEY_LENGTHS), 2, HEADS, DIM)}
        shapes["upstream0"] = (self.size, HEADS, DIM)
        return {
            name: torch.randn(shape, generator=generator).to(self.device, kind)
            for name, shape in shapes.items()
        }

    def refusals(self, backend: str) -> list[str]:
        """Return the reasons why a backend cannot run the call."""
        leaves = [x for name, x in self.tensors.items() if not name.startswith("upstream")]
        return backends.BACKENDS[backend].why_not(self.operator, *leaves)

    def outputs(self, leaves: dict[str, Tensor], backend: str | None) -> tuple[Tensor]:
        """Output of the operator on a backend; with None, of its formula in the tensors' type."""
        if backend is None:
            return (self._plain(**leaves),)
        sequences, other = (
            Sequences.from_lengths(torch.tensor(lengths, device=self.device))
            for lengths in (LENGTHS, KEY_LENGTHS)
        )
        return (
            varlen_attention(
                leaves["query"],
                leaves.get("key"),
                None,
                sequences,
                other if self.variant == "other keys" else None,
                causal=self.variant == "causal",
                scale=SCALE,
                backend=backend,
            ),
        )

    def _plain(self, query: Tensor, key: Tensor | None = None) -> Tensor:
        """Softmax times values, one sequence after the other."""
        if key is None:
            query, *both = query.unbind(1)
        else:
            both = list(key.unbind(1))
        keys, values = (x.split(self._key_lengths) for x in both)
        heard = []
        for q, k, v in zip(query.split(LENGTHS), keys, values, strict=True):
            scores = SCALE * torch.einsum("ihd,jhd->hij", q, k)
            if self.variant == "causal":
                later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            heard.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
        return torch.cat(heard)
