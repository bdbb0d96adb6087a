"""Otsu's method on rows of emotion values: which emotions are relevant (the hard strategy, Appendix B)."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecore_kernels import backends, reference
from ecore_kernels.native_kernels import otsu as native_otsu
from ecore_kernels.operators.batching import Fold, batch_of
from ecore_kernels.operators.registration import dispatches, library
from ecore_kernels.refusals import expect_tensors, shown


class OtsuSplit(NamedTuple):
    """The split of every row.

    Attributes:
        mask: [B, P] bool, values >= threshold: the relevant ones.
        count: [B] int64, how many are relevant.
        threshold: [B], the smallest relevant value.
    """

    mask: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple has a method of that name
    threshold: Tensor


library.define("otsu(Tensor values, int? max_relevant, str backend) -> (Tensor, Tensor, Tensor)")


def _check(values: Any, max_relevant: Any) -> None:
    """Raise ValueError for values that have no split."""
    expect_tensors("otsu", values=values)
    if values.dim() != 2 or values.shape[1] < 1:
        raise ValueError(f"otsu: values: expected [B, P] with P >= 1, got {list(values.shape)}")
    if not values.is_floating_point():
        raise ValueError(f"otsu: values: expected a float type, got {values.dtype}")
    if max_relevant is not None and (not isinstance(max_relevant, numbers.Integral) or max_relevant < 1):
        raise ValueError(f"otsu: max_relevant: expected at least 1 or None, got {shown(max_relevant)}")


def _otsu(values: Tensor, max_relevant: int | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _check(values, max_relevant)  # the registered operator can be called directly
    run = native_otsu.otsu if backend == "native" else reference.otsu
    return run(values, max_relevant)


def _otsu_fake(values: Tensor, max_relevant: int | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = values.shape[:1]
    return (
        values.new_empty(values.shape, dtype=torch.bool),
        values.new_empty(rows, dtype=torch.int64),
        values.new_empty(rows),
    )


library.impl("otsu", _otsu, "CompositeExplicitAutograd")


torch.library.register_fake("ecore_kernels::otsu", _otsu_fake, lib=library)


def _rule(info: Any, dims: Sequence[Any], values: Tensor, max_relevant: int | None, backend: str) -> Any:
    fold = Fold(info.batch_size, batch_of(values, dims[0]))
    results = torch.ops.ecore_kernels.otsu(fold.fold(values, dims[0]), max_relevant, backend)
    return tuple(map(fold.unfold, results)), (0, 0, 0)


torch.library.register_vmap("ecore_kernels::otsu", _rule, lib=library)


def otsu(values: Tensor, max_relevant: int | None = 5, *, backend: str | None = None) -> OtsuSplit:
    """Split every row into relevant and other values, maximising the variance between the two (Eqs. 14, 20, 21).

    With the row sorted in descending order, S_n the sum of its n largest values and mu its mean, a split of n relevant
    values scores ``(S_n - n mu)^2 / (n (P - n))`` in float64, which orders splits as Eq. 21 does. The best n wins, the
    smaller one on a tie. Every value not below the n-th largest is relevant, so equal values are never separated (and
    there may be more than ``max_relevant`` of them). A row of one value, or of equal values, is relevant as a whole.

    Args:
        values: [B, P], any float type.
        max_relevant: the largest n that is tried; None tries every split.
        backend: "reference" or "native"; None takes the fastest that can run the call.

    Returns:
        An :class:`OtsuSplit`. Not differentiable.

    Raises:
        ValueError: a shape, type or max_relevant out of range; on CPU also a value that is not finite. On CUDA, where
            the check would synchronise, such a row gets an empty mask, count 0 and threshold NaN.
        RuntimeError: the named backend cannot run the call.
    """
    _check(values, max_relevant)
    values = values.detach()
    name = backends.choose("otsu", backend, values)
    if dispatches((values,)):
        return OtsuSplit(*torch.ops.ecore_kernels.otsu(values, max_relevant, name))
    return OtsuSplit(*_otsu(values, max_relevant, name))


backends.register("otsu", otsu, None)
