"""The weights of generation in few bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ecore.model.decoder import Affine, BlockWeights, Decoder
from ecore.model.outputs import expect_finite
from ecore_kernels import QuantizedLinear

_NORMS = ("self_norm", "cross_norm", "feed_forward_norm")


class QuantizedWeights:
    """The weights that a step of the decoder reads, in int8 or bfloat16, in addition to the model's own.

    They are rounded when they are first needed, and again when the model's own have changed or moved. Norms and biases
    stay float32.

    Args:
        decoder: its blocks.
        output: the layer to the vocabulary.
        dtype: torch.int8 or torch.bfloat16.
    """

    def __init__(self, decoder: Decoder, output: nn.Linear, dtype: torch.dtype) -> None:
        self._decoder, self._output, self.dtype = decoder, output, dtype
        self._made_from: list[tuple[int, int]] = []
        self._made: tuple[list[BlockWeights], QuantizedLinear] | None = None

    def present(self) -> tuple[list[BlockWeights], QuantizedLinear]:
        """Return the weights of each block and the output layer."""
        parameters = [*self._decoder.blocks.parameters(), *self._output.parameters()]  # type: ignore[attr-defined]
        state = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in parameters]
        if self._made is None or state != self._made_from:
            blocks = [self._block(block.weights()) for block in self._decoder.blocks]
            self._made = blocks, self._rounded(self._output.weight, self._output.bias)
            self._made_from = state
        return self._made

    def _block(self, weights: BlockWeights) -> BlockWeights:
        def affine(name: str, own: Affine) -> Affine:
            return own if name in _NORMS else (self._rounded(*own), own[1])

        return BlockWeights(*(affine(name, own) for name, own in weights._asdict().items()))

    def _rounded(self, weight: Tensor, bias: Tensor) -> QuantizedLinear:
        expect_finite(weight.abs(), "weights")
        return QuantizedLinear.of(weight, bias, self.dtype)
