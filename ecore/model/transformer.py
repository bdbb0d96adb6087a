"""The transformer parts that encoder and decoder share (Vaswani et al., 2017)."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ecore.model.packing import Packing, Padded
from ecore.precision import for_products
from ecore_kernels import QuantizedLinear, dropout_add_layer_norm, quantized_linear, varlen_attention


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """[length, dim]: sine and cosine of the position at geometrically spaced wavelengths (Vaswani et al., Sec. 3.5)."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    table = torch.zeros(length, dim, dtype=torch.float64)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: dim // 2])
    return table.float()


class SublayerEnds:
    """Ends of sublayers: dropout, the residual connection and the norm before the next sublayer, in one operator each.

    Args:
        count: how many at most; the seeds of their masks are drawn together.
        dropout: of their masks.
        x: where they run.
    """

    def __init__(self, count: int, dropout: nn.Dropout, x: Tensor) -> None:
        self._p = dropout.p if dropout.training else 0.0
        self._seeds: Iterator[Tensor] | None = None
        if self._p > 0.0:
            seeds = torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=x.device)
            self._seeds = iter(seeds.unbind())

    def begin(self, embedded: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Return the norm of ``dropout(embedded)``, and the latter itself: what the first sublayer reads."""
        return self(embedded, torch.zeros_like(embedded), norm)

    def __call__(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Return the norm of ``residual + dropout(x)``, and the sum itself; all [..., D]."""
        seed = None if self._seeds is None else next(self._seeds)
        return dropout_add_layer_norm(x, residual, norm.weight, norm.bias, self._p, eps=norm.eps, seed=seed)


def added_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return what attention to x adds to its scores: mask [B, S] bool -> [B, 1, 1, S], 0 or minus infinity.

    PyTorch would make it of a mask in each call.
    """
    added = mask.to(x.dtype).log()
    return (for_products(added) if added.is_cuda else added)[:, None, None]


Projection = tuple[Tensor, Tensor | None]
"""Weight and bias of several linear layers, on top of each other."""


def stacked(groups: Sequence[Sequence[nn.Linear]]) -> list[Projection]:
    """Return the projection of each group of layers, which read inputs of the same width; all groups in one copy.

    A step launches many products too small for a GPU, and two gradients for each: one product of all layers that read
    the same takes less. Weights stay apart in the model, for the sake of its checkpoints.
    """
    biased = [group for group in groups if group[0].bias is not None]
    weights = _Stacked.apply(
        [len(group) for group in groups], *(layer.weight for group in groups for layer in group)
    )
    biases = iter(
        _Stacked.apply([len(group) for group in biased], *(layer.bias for group in biased for layer in group))
    )
    return [
        (weight, None if group[0].bias is None else next(biases))
        for group, weight in zip(groups, weights, strict=True)
    ]


class _Stacked(torch.autograd.Function):
    """Groups of tensors, each group's on top of each other; gradients come back as parts, without a copy."""

    @staticmethod
    def forward(ctx: Any, counts: Sequence[int], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        rows = iter([len(part) for part in parts])
        ctx.groups = [[next(rows) for _ in range(count)] for count in counts]
        return torch.cat(parts).split([sum(group) for group in ctx.groups])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found: list[Tensor | None] = []
        for grad, rows in zip(grads, ctx.groups, strict=True):
            found += [None] * len(rows) if grad is None else grad.split(rows)
        return (None, *found)


def in_heads(x: Tensor, count: int, heads: int) -> tuple[Tensor, ...]:
    """Take projections apart that lie side by side: x [B, T, count * width] -> each [B, heads, T, width / heads]."""
    if count == 1:
        return (x.unflatten(-1, (heads, -1)).transpose(1, 2),)
    # Apart before they are turned: so the gradients are put together in the order of x, without a copy.
    parts = x.unflatten(-1, (count, heads, -1)).unbind(2)
    return tuple(part.transpose(1, 2) for part in parts)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention; ``width`` is that of all heads together."""

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, width)
        self.key = nn.Linear(dim, width)
        self.value = nn.Linear(dim, width)
        self.output = nn.Linear(width, dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @property
    def own_layers(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Return the projections to queries, keys and values."""
        return self.query, self.key, self.value

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, S, width / heads] of source [B, S, D]."""
        return self._split(self.key(source)), self._split(self.value(source))

    def queries(self, x: Tensor) -> Tensor:
        """Queries [B, heads, T, width / heads] of x [B, T, D]."""
        return self._split(self.query(x))

    def of_itself(
        self,
        x: Tensor,
        projection: Projection,
        layout: Packing | Padded,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Return what rows of words attend to in their own text.

        Args:
            x: [R, D].
            projection: that of :attr:`own_layers`.
            layout: of the rows.
            mask: as for :meth:`forward`; not needed where attention is among rows.
            causal: words attend to none after them.

        Returns:
            [R, D].
        """
        projected = F.linear(x, *projection)  # [R, 3 * width]
        if layout.sequences is not None:
            apart = projected.unflatten(-1, (3, self.heads, -1))
            heard = varlen_attention(apart, None, None, layout.sequences, causal=causal).flatten(1)
        else:
            queries, keys, values = in_heads(layout.unpack(projected), 3, self.heads)
            heard = layout.pack(attended(queries, keys, values, mask, causal))
        return self.output(heard)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Return the attended values, [B, T, D]; mask broadcasts to [B, heads, T, S]: bool, True where
        visible, or added to the scores."""
        return self.output(attended(queries, keys, values, mask, causal))


def attended(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return attended values with the heads side by side, [B, T, width]; mask as for :class:`MultiHeadAttention`."""
    return _attention(queries, keys, values, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(2)


ALIGNED_HEAD = 8
"""Head sizes are padded to a multiple of this: a GPU's fused masked attention needs it in low precision."""


def _pads_heads(queries: Tensor) -> bool:
    """Return whether heads must be padded with zeros: otherwise the scores would go through memory."""
    return queries.is_cuda and queries.dtype.itemsize == 2 and queries.shape[-1] % ALIGNED_HEAD != 0


def _attention(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    """PyTorch's attention, on a CPU always in float32 at least.

    There it multiplies small blocks. In low precision oneDNN would compile a kernel for each shape of those.
    """
    kind, size = queries.dtype, queries.shape[-1]
    if _pads_heads(queries) and options.get("attn_mask") is not None:
        padding = (0, -size % ALIGNED_HEAD)
        queries, keys, values = (F.pad(x, padding) for x in (queries, keys, values))
        return F.scaled_dot_product_attention(queries, keys, values, scale=size**-0.5, **options)[..., :size]
    if queries.is_cuda or kind.itemsize > 2:
        return F.scaled_dot_product_attention(queries, keys, values, **options)
    with torch.autocast("cpu", enabled=False):
        attended = F.scaled_dot_product_attention(queries.float(), keys.float(), values.float(), **options)
        return attended.to(kind)


def mean_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """The heads' scaled products of queries [B, heads, T, d] and keys [B, heads, S, d], averaged: [B, T, S]."""
    heads, width = queries.shape[1], queries.shape[3]
    # The sum over the heads is one product of rows as wide as all of them.
    queries, keys = queries.transpose(1, 2).flatten(2), keys.transpose(1, 2).flatten(2)
    return (queries * (width**-0.5 / heads)) @ keys.mT


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of few queries, without gradients.

    Args:
        query: [B, heads, T, d].
        keys, values: [B, heads, S, d]; on CPU B and heads are one dimension in memory.
        bias: what is added to the scores, broadcasts to [B, heads, T, S]; None means nothing.

    Returns:
        [B, T, heads * d].
    """
    batch, heads = query.shape[:2]
    if batch == 1 or query.is_cuda:
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
    else:  # many products too small for blocked attention to win: this takes half the time
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        added = query.new_zeros(()) if bias is None else bias.expand(batch, heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(added, query.flatten(0, 1), keys.mT, alpha=query.shape[3] ** -0.5)
        attended = torch.bmm(scores.softmax(-1), values).unflatten(0, (batch, heads))
    return attended.transpose(1, 2).flatten(2)


_FEW_ROWS = 128
_LARGE = 2**16
FEWER_ROWS = 8
"""At most so many rows are multiplied by float32 weights in ``quantized_linear``: for more the libraries are faster."""


@functools.cache
def _splits_products() -> bool:
    """Return True where products of few rows take less time in parts, one a thread: except for MKL on Intel's CPUs."""
    if not torch.backends.mkl.is_available():
        return True
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        described = platform.processor()
    return "GenuineIntel" not in described


def project(x: Tensor, weight: Tensor | QuantizedLinear, bias: Tensor) -> Tensor:
    """``linear(x, weight, bias)`` of few rows: x [B, D], weight [O, D] -> [B, O].

    Weights of few bits have their own bias with them.

    On CPU such a product takes as long as reading the weights, and except for MKL on Intel's the libraries read a large
    matrix on one thread where there is one row and in an order that suits many rows where there are a few. There every
    thread multiplies its part of the weights, as they lie, by all rows.
    """
    if isinstance(weight, QuantizedLinear):
        if weight.weight.dtype is not torch.float32 or len(x) <= FEWER_ROWS:
            return quantized_linear(x, weight)
        weight = weight.weight
    parts = torch.get_num_threads()
    few = parts > 1 and len(x) <= _FEW_ROWS and weight.numel() >= _LARGE
    if not few or x.is_cuda or not _splits_products():
        return F.linear(x, weight, bias)
    even = len(weight) - len(weight) % parts
    shared, own = weight[:even].view(parts, -1, weight.shape[1]), x.mT.expand(parts, -1, -1)
    product = torch.baddbmm(bias[:even].view(parts, -1, 1), shared, own).flatten(0, 1).mT
    if even == len(weight):  # one row gets the strides of a row: with others, a product that reads it is slow
        return product.reshape(-1).view(len(x), even)
    return torch.cat([product, F.linear(x, weight[even:], bias[even:])], dim=1)


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear; the first two are one operation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        expand, contract = self[0], self[2]
        x = for_products(x)
        hidden = _LinearReLU.apply(x.flatten(0, -2), expand.weight.to(x.dtype), expand.bias.to(x.dtype))
        return contract(hidden.view(*x.shape[:-1], -1))


class _LinearReLU(torch.autograd.Function):
    """ReLU of a product and a bias, in the product's last step; gradients pass where the result is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden = torch._addmm_activation(bias, x, weight.mT)
        ctx.save_for_backward(x, weight, hidden)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, hidden = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, hidden, 0)
        return grad @ weight, grad.mT @ x, grad.sum(0)
