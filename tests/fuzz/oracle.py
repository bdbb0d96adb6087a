"""The right answer to a case, layer by layer as the paper writes it in float64, and how far off an answer may be.

The recurrence shares nothing with the operators but the graph's own ``dense``. An answer is right if each tensor's
error is within twice that of the recurrence in the case's type, plus rounding, by its norm and by its largest element.
Where that fails, luck may be to blame: a single draw of plain PyTorch's error can be small where it usually is not, and
a sum may cancel. Then the allowance is eight times the largest error among nine draws of the recurrence's, with
inputs that differ in their last bits, plus rounding of the terms that the sums consist of.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ecore_kernels import reference
from tests.fuzz import sequences, sparse
from tests.fuzz.cases import Case, graph_of, mapped

DRAWS, SLACK = 8, 8.0
ROUNDING = 4.0  # in units of the type's epsilon


class _Magnitudes(torch.autograd.Function):
    """Attention weights as a constant factor; backward, the terms of a softmax's gradient without their signs."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, attention: Tensor) -> Tensor:
        ctx.save_for_backward(attention)
        return attention.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (attention,) = ctx.saved_tensors
        return attention * (gradient + (attention * gradient).sum(-1, keepdim=True)), None


def _scores(query: Tensor, key: Tensor, edge: Tensor, scale: float) -> Tensor:
    """Eq. 7: [B, K, N, N]."""
    return scale * (query @ key.mT) * edge


def _updated(tensors: dict[str, Any], layer: Any, edge: Tensor, scores: Tensor, neighbors: Tensor) -> Tensor:
    """Eq. 5: the edges after a layer [B, K, N, N]."""
    new_edge = edge + scores
    if f"gate{layer}" in tensors:
        new_edge = tensors[f"gate{layer}"][..., None] * tensors[f"edge_scale{layer}"] * new_edge
    return new_edge.masked_fill(~neighbors, 0.0)


def _attended(
    scores: Tensor, neighbors: Tensor, value: Tensor, attention: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Eqs. 6 and 4: [B, K, N, dv], and the weights; those given are taken for magnitudes."""
    if attention is None:
        scores = scores.masked_fill(~neighbors, torch.finfo(scores.dtype).min)
        attention = scores.softmax(-1).masked_fill(~neighbors, 0.0)
        return attention @ value, attention.detach()
    return _Magnitudes.apply(scores, attention) @ value, attention


def _dense(
    case: Case, tensors: dict[str, Any], scale: float, magnitudes: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """An edge_attention; ``magnitudes`` as in :func:`recurrence`."""
    options, query = case.options, tensors["query"]
    key, value = (
        tensors[name].repeat_interleave(query.shape[1] // tensors[name].shape[1], 1)
        for name in ("key", "value")
    )
    full = (*query.shape[:3], key.shape[2])
    edge = tensors.get("edge", torch.ones(())).to(query.dtype).expand(full)
    neighbors = tensors.get("neighbors", torch.ones((), dtype=torch.bool)).expand(full)
    scores = scale * (query @ key.mT)
    if "clamp" in options and magnitudes is None:
        scores = scores.clamp(*options["clamp"])
    scores = scores * edge
    if "sender_gate" in tensors:
        scores = scores * tensors["sender_gate"][:, :, None]
    logits = scores + tensors.get("bias", 0.0)
    masked = logits.masked_fill(~neighbors, torch.finfo(logits.dtype).min)
    attention = masked.softmax(-1).masked_fill(~neighbors, 0.0) if magnitudes is None else magnitudes
    weights = attention if magnitudes is None else _Magnitudes.apply(logits, attention)
    kept = weights
    if options.get("dropout"):
        seed = torch.tensor(options["seed"] - 2**64 * (options["seed"] >= 2**63))
        kept = weights * reference.kept_weights(seed, options["dropout"], full, query.dtype)
    outputs = [kept @ value]
    if any(name in tensors for name in ("gate", "edge_scale", "edge_bias")):
        factor = tensors.get("gate", torch.ones((), dtype=query.dtype))[..., None] * tensors.get(
            "edge_scale", 1.0
        )
        updated = factor * (edge + scores) + tensors.get("edge_bias", 0.0)
        outputs.append(updated if options.get("update") == "all" else updated.masked_fill(~neighbors, 0.0))
    if options.get("return_lse"):
        hears = neighbors.any(-1)
        sums = masked.logsumexp(-1) if magnitudes is None else (attention * logits).sum(-1)
        outputs.append(sums.masked_fill(~hears, 0.0))
    return tuple(outputs), attention.detach()


def recurrence(
    case: Case, tensors: dict[str, Any], scale: float, attention: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The outputs of a case in the type of its tensors, and its attention weights [B, K, N, N] if it has any.

    With ``attention`` nothing in the gradients cancels if nothing in ``tensors`` is negative.
    """
    if case.operator == "edge_attention":
        return _dense(case, tensors, scale, attention)
    if case.operator in ("sparse_attention", "varlen_attention"):
        if case.operator == "sparse_attention":
            logits, hears, value = sparse.logits_and_values(tensors, scale)
        else:
            logits, hears, value = sequences.logits_and_values(case, tensors, scale)
        output, attention = _attended(logits, hears, value, attention)
        return (output.transpose(0, 1),), attention
    graph = graph_of(tensors)
    edge, neighbors = graph.dense()
    words = graph.shape[2]
    for m in range(case.depth):
        scores = _scores(tensors[f"query{m}"], tensors[f"key{m}"], edge, scale)
        edge = _updated(tensors, m, edge, scores, neighbors)
    if case.operator == "edge_readout":
        received = edge[..., words:].sum(1)  # [B, N, P]
        to_word = received[:, :words]
        return (to_word if case.options["per_word"] else to_word.sum(1), received[:, words:]), None
    scores = _scores(tensors["query"], tensors["key"], edge, scale)
    output, attention = _attended(scores, neighbors, tensors["value"], attention)
    return (output[:, :, :words] if case.options["receivers"] == "words" else output,), attention


def answer(
    case: Case, tensors: dict[str, Any], outputs: tuple[Tensor, ...], upstream: list
) -> dict[str, Tensor]:
    """Outputs and the gradients of what is wanted, by name."""
    found = {f"output {number}": x.detach() for number, x in enumerate(outputs)}
    leaves = {id(tensors[name]): (name, tensors[name]) for name in reversed(case.wanted)}
    pairs = [(x, u) for x, u in zip(outputs, upstream, strict=True) if u is not None and x.requires_grad]
    if not leaves:
        return found
    gradients: Any = [torch.zeros_like(x) for _, x in leaves.values()]
    if pairs:
        sent = [u.to(x.dtype) for x, u in pairs]
        gradients = torch.autograd.grad(
            [x for x, _ in pairs],
            [x for _, x in leaves.values()],
            sent,
            allow_unused=True,
            materialize_grads=True,
        )
    names = [name for name, _ in leaves.values()]
    return found | {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)}


def asking(case: Case, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors, those in ``case.wanted`` asking for gradients."""
    wanted = {id(tensors[name]) for name in case.wanted}
    return mapped(tensors, lambda x: x.detach().requires_grad_(id(x) in wanted))


def _sizes(x: Tensor) -> Tensor:
    """Frobenius norm and largest element, [2]; NaN where something is not finite."""
    x = x.double()
    if x.numel() == 0:
        return torch.zeros(2)
    if not bool(x.isfinite().all()):
        return torch.full((2,), math.nan)
    return torch.stack([torch.linalg.vector_norm(x), x.abs().max()])


class Expected:
    """The right answer to a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.upstream = [None if u is None else u.double() for u in case.upstream]
        self.wide = mapped(case.tensors, lambda x: x.double() if x.is_floating_point() else x)
        self.scale = case.options["scale"]
        if self.scale is None:
            some = self.wide.get("query", self.wide.get("query0"))
            self.scale = 1.0 if some is None else some.shape[-1] ** -0.5
        asked = asking(case, self.wide)
        outputs, self._attention = recurrence(case, asked, self.scale)
        self.exact = answer(case, asked, outputs, self.upstream)
        self.plain = self._draw(None)

    def _draw(self, seed: int | None) -> dict[str, Tensor]:
        """Errors of plain PyTorch in the case's type, [2] by name; with a seed, the inputs' last bits differ."""
        # In float64 there is nothing to compare with: float32's error, scaled, tells how far rounding is carried.
        kind = torch.float32 if self.case.kind is torch.float64 else self.case.kind
        factor = torch.finfo(self.case.kind).eps / torch.finfo(kind).eps
        generator = torch.Generator().manual_seed(seed or 0)

        def changed(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            if seed is not None:
                noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5
                x = x * (1 + torch.finfo(kind).eps * noise)
            return x.to(kind)

        asked = asking(self.case, mapped(self.wide, changed))
        outputs, _ = recurrence(self.case, asked, self.scale)
        found = answer(self.case, asked, outputs, self.upstream)
        return {name: factor * _sizes(found[name].double() - x) for name, x in self.exact.items()}

    @functools.cached_property
    def generous(self) -> dict[str, Tensor]:
        """The largest of several errors of plain PyTorch, [2] by name."""
        draws = [self.plain, *(self._draw(seed) for seed in range(DRAWS))]
        return {name: torch.stack([d[name] for d in draws]).amax(0) for name in self.exact}

    @functools.cached_property
    def magnitudes(self) -> dict[str, Tensor]:
        """Sizes of the answer's tensors if nothing in any sum cancelled, [2] by name."""
        tensors = mapped(self.wide, lambda x: x if x.dtype is torch.bool else x.abs())
        asked = asking(self.case, {n: abs(x) if isinstance(x, float) else x for n, x in tensors.items()})
        outputs, _ = recurrence(self.case, asked, abs(self.scale), self._attention)
        sent = [None if u is None else u.abs() for u in self.upstream]
        return {name: _sizes(x) for name, x in answer(self.case, asked, outputs, sent).items()}

    def wrong(self, found: dict[str, Tensor]) -> str:
        """Describe an answer's fault, "" if it has none."""
        for name, exact in self.exact.items():
            actual = found[name]
            if actual.shape != exact.shape:
                return f"{name}: expected shape {list(exact.shape)}, got {list(actual.shape)}"
            error, size = _sizes(actual.cpu().double() - exact), _sizes(exact)
            rounding = ROUNDING * max(torch.finfo(kind).eps for kind in (actual.dtype, self.case.kind))
            if bool((error <= 2 * self.plain[name] + rounding * size).all()):
                continue
            allowed = SLACK * self.generous[name] + rounding * self.magnitudes[name]
            if not bool((error <= allowed).all()):
                numbers = ", ".join(
                    f"{word} {float(x[0]):.2g} and {float(x[1]):.2g}"
                    for word, x in (("error", error), ("allowed", allowed), ("size", size))
                )
                return f"{name}: {numbers} (norm and largest element)"
        return ""
