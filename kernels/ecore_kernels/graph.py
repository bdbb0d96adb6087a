"""The multi-resolution emotion graph: the neighbours of each node, and the initial edge weights (Sec. 3.2, Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecore_kernels.refusals import expect_tensors


@dataclass(frozen=True, eq=False)
class EmotionGraph:
    """A batch of emotion graphs over M words (word 0 is ``[CLS]``) and P emotions at K resolutions.

    Nodes 0...M-1 are words, M...M+P-1 emotions; N = M + P. The graph is stored as the vectors that determine it;
    :meth:`dense` writes it out as matrices.

    The neighbours of a node are those that it attends to. Among the nodes that take part in a resolution, ``[CLS]``
    attends to every word and every emotion; word i to ``[CLS]``, words j <= i and every emotion; an emotion to
    ``[CLS]`` and every other emotion. A word that does not take part in a resolution neither sends nor receives there.
    (Names and comments in the kernels say *hears* for *attends to*.)

    Args:
        word_weight: [B, M], initial weight of an edge that word j sends to any word (slot 0 is ignored: ``[CLS]``
            sends 1).
        word_mask: [B, K, M] bool, word j takes part in resolution k (slot 0 always does, whatever its value).
        emotion_weight: [B, P], initial weight of an edge that emotion j sends to a word.
        correlation: [P, P] or [B, P, P], initial weight of an edge that emotion j sends to emotion i (row i, column
            j): a softmax over all P, which is not normalised again when emotions are masked.
        emotion_mask: [B, P] bool, emotions that take part; None means all.

    Raises:
        ValueError: a shape or a type that does not fit the others.
    """

    word_weight: Tensor
    word_mask: Tensor
    emotion_weight: Tensor
    correlation: Tensor
    emotion_mask: Tensor | None = None

    def __post_init__(self) -> None:
        given = dict(zip(_FIELDS, self.tensors(), strict=True))
        if self.emotion_mask is None:
            del given["emotion_mask"]
        expect_tensors("EmotionGraph", **given)
        if self.word_mask.dim() != 3:
            raise ValueError(f"EmotionGraph: word_mask: expected [B, K, M], got {list(self.word_mask.shape)}")
        if self.emotion_weight.dim() != 2:
            raise ValueError(
                f"EmotionGraph: emotion_weight: expected [B, P], got {list(self.emotion_weight.shape)}"
            )
        batch, resolutions, words = self.word_mask.shape
        emotions = self.emotion_weight.shape[1]
        if min(resolutions, words, emotions) < 1:
            raise ValueError(
                "EmotionGraph: expected at least one resolution, one word ([CLS]) and one emotion"
            )
        correlation = (emotions, emotions) if self.correlation.dim() == 2 else (batch, emotions, emotions)
        for name, value, shape in (
            ("word_weight", self.word_weight, (batch, words)),
            ("emotion_weight", self.emotion_weight, (batch, emotions)),
            ("correlation", self.correlation, correlation),
            ("emotion_mask", self.emotion_mask, (batch, emotions)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"EmotionGraph: {name}: expected {list(shape)}, got {list(value.shape)}")
        for name, value in (("word_mask", self.word_mask), ("emotion_mask", self.emotion_mask)):
            if value is not None and value.dtype != torch.bool:
                raise ValueError(f"EmotionGraph: {name}: expected torch.bool, got {value.dtype}")
        for name in ("word_weight", "emotion_weight", "correlation"):
            if not getattr(self, name).is_floating_point():
                raise ValueError(
                    f"EmotionGraph: {name}: expected a float type, got {getattr(self, name).dtype}"
                )

    @classmethod
    def from_intensity(
        cls,
        intensity: Tensor,
        lengths: Tensor,
        thresholds: Sequence[float] | Tensor,
        correlation: Tensor,
        emotion_weight: Tensor | None = None,
        emotion_mask: Tensor | None = None,
    ) -> EmotionGraph:
        """Make the graph of contexts whose words have the given emotion intensities (Eq. 3).

        Args:
            intensity: [B, M], c_j >= 0 of every word; slot 0 and padding are ignored.
            lengths: [B], words of each context, ``[CLS]`` counted.
            thresholds: K numbers, or a tensor [K]; word j takes part in resolution k when c_j >= thresholds[k].
            correlation: [P, P] or [B, P, P], Softmax_j(R).
            emotion_weight: [B, P]; None means 1/P everywhere.
            emotion_mask: [B, P] bool; None means all emotions.

        Raises:
            ValueError: a shape that does not fit.
        """
        expect_tensors("from_intensity", intensity=intensity, lengths=lengths, correlation=correlation)
        if intensity.dim() != 2 or lengths.shape != intensity.shape[:1]:
            raise ValueError(
                f"from_intensity: expected intensity [B, M] and lengths [B], got {list(intensity.shape)} and "
                f"{list(lengths.shape)}"
            )
        if isinstance(thresholds, str) or not hasattr(thresholds, "__len__"):
            got = type(thresholds).__name__
            raise ValueError(f"from_intensity: thresholds: expected a sequence of numbers, got {got}")
        if len(thresholds) == 0:
            raise ValueError("from_intensity: thresholds: expected at least one")
        if isinstance(thresholds, Tensor) and thresholds.dim() != 1:
            raise ValueError(f"from_intensity: thresholds: expected [K], got {list(thresholds.shape)}")
        batch, words = intensity.shape
        position = torch.arange(words, device=intensity.device)
        padding, first = position >= lengths[:, None], position == 0
        intensity = intensity.masked_fill(padding | first, 0.0)
        peak = torch.linalg.vector_norm(intensity, torch.inf, 1, keepdim=True)
        # A context without any intensity keeps weights of zero instead of 0/0.
        word_weight = intensity / torch.where(peak > 0, peak, 1.0)
        # [CLS] reaches every threshold, NaN reaches none.
        level = intensity.masked_fill(first, torch.inf).masked_fill(padding, torch.nan)
        if isinstance(thresholds, Tensor):
            word_mask = level[:, None] >= thresholds[:, None]
        else:
            word_mask = torch.stack([level >= t for t in thresholds], dim=1)
        if emotion_weight is None:
            emotions = correlation.shape[-1]
            emotion_weight = correlation.new_full((batch, emotions), 1.0 / emotions)
        return cls(word_weight, word_mask, emotion_weight, correlation, emotion_mask)

    def to(self, *args: Any, **kwargs: Any) -> EmotionGraph:
        """The graph on a device or in a float type; arguments as those of :meth:`torch.nn.Module.to`.

        A type is applied to the weights; the masks stay bool.

        Raises:
            ValueError: a type that is no float type.
        """
        device, kind, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if kind is not None and not kind.is_floating_point:
            raise ValueError(f"EmotionGraph.to: expected a float type, got {kind}")

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, kind if tensor.is_floating_point() else None, non_blocking)

        return self._of(moved)

    def pin_memory(self) -> EmotionGraph:
        """The graph in page-locked memory, from which it can be copied to a GPU during other work."""
        return self._of(Tensor.pin_memory)

    def _of(self, function: Callable[[Tensor], Tensor]) -> EmotionGraph:
        """The graph whose tensors are ``function`` of this one's."""
        return _unflatten([None if x is None else function(x) for x in self.tensors()], None)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The graph's tensors, in the order of its arguments."""
        return self.word_weight, self.word_mask, self.emotion_weight, self.correlation, self.emotion_mask

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, M, P)."""
        batch, resolutions, words = self.word_mask.shape
        return batch, resolutions, words, self.emotion_weight.shape[1]

    def participants(self) -> Tensor:
        """[B, K, N] bool: the nodes that take part in each resolution."""
        batch, resolutions, words, emotions = self.shape
        first = torch.arange(words, device=self.word_mask.device) == 0
        if self.emotion_mask is None:
            emotion_mask = self.word_mask.new_ones((1, 1, 1))
        else:
            emotion_mask = self.emotion_mask[:, None]
        return torch.cat([self.word_mask | first, emotion_mask.expand(batch, resolutions, emotions)], dim=2)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Write the graph out as matrices.

        Returns:
            edge: [B, K, N, N], the initial weight E0 of the edge that node j (column) sends to node i (row); 0 off the
                graph.
            neighbors: [B, K, N, N] bool, node i attends to node j.
        """
        batch, _, words, emotions = self.shape
        nodes = words + emotions
        index = torch.arange(nodes, device=self.word_mask.device)
        receiver, sender = index[:, None], index[None, :]
        hears = torch.where(
            receiver < words,
            (sender <= receiver) | (receiver == 0) | (sender >= words),
            (sender == 0) | ((sender >= words) & (sender != receiver)),
        )
        takes_part = self.participants()
        neighbors = hears & takes_part[..., :, None] & takes_part[..., None, :]

        kind = torch.promote_types(self.word_weight.dtype, self.emotion_weight.dtype)
        kind = torch.promote_types(kind, self.correlation.dtype)
        word_weight = torch.where(index[:words] == 0, 1.0, self.word_weight.to(kind))
        to_words = torch.cat([word_weight, self.emotion_weight.to(kind)], dim=1)[:, None].expand(
            batch, words, nodes
        )
        from_words = (index[:words] == 0).to(kind).expand(batch, emotions, words)
        correlation = self.correlation.to(kind).expand(batch, emotions, emotions)
        edge = torch.cat([to_words, torch.cat([from_words, correlation], dim=2)], dim=1)
        return torch.where(neighbors, edge[:, None], 0.0), neighbors


_FIELDS = tuple(field.name for field in fields(EmotionGraph))


def _unflatten(values: Iterable[Any], _: Any) -> EmotionGraph:
    """A graph of these fields, without checks: in a pytree they may be anything (shapes, gradients, None)."""
    graph = object.__new__(EmotionGraph)
    for name, value in zip(_FIELDS, values, strict=True):
        object.__setattr__(graph, name, value)
    return graph


def _flatten(graph: EmotionGraph) -> tuple[list[Any], None]:
    return [getattr(graph, name) for name in _FIELDS], None


def _flatten_with_keys(graph: EmotionGraph) -> tuple[list[tuple[Any, Any]], None]:
    return [(pytree.GetAttrKey(name), getattr(graph, name)) for name in _FIELDS], None


torch.serialization.add_safe_globals(
    [EmotionGraph]
)  # tensors alone; exported programs are loaded with their examples

# For torch.func, torch.export and AOTInductor; the name is what exported programs are saved under.
pytree.register_pytree_node(
    EmotionGraph,
    _flatten,
    _unflatten,
    serialized_type_name="ecore_kernels.EmotionGraph",
    flatten_with_keys_fn=_flatten_with_keys,
)
