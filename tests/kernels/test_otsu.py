"""otsu against Eq. 21 taken literally, in exact arithmetic, on every backend that has it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from ecore_kernels import backends, otsu

BACKENDS = [
    pytest.param(
        backend.name,
        marks=pytest.mark.skipif(bool(backend.why_not("otsu")), reason="; ".join(backend.why_not("otsu"))),
    )
    for backend in backends.BACKENDS.values()
    if "otsu" in backend.refusals
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def between_variance(chosen: list[Fraction], others: list[Fraction]) -> Fraction:
    """Eq. 21: each side's share of the values times its mean's squared distance from the mean of all."""
    everything = chosen + others
    mean = sum(everything) / len(everything)
    return sum(
        Fraction(len(side), len(everything)) * (mean - sum(side) / len(side)) ** 2
        for side in (chosen, others)
    )


def by_hand(row: list[float], max_relevant: int | None) -> tuple[list[bool], float]:
    """Relevant values and their smallest, by trying every split of the sorted row."""
    ordered = sorted((Fraction(x) for x in row), reverse=True)
    if ordered[0] == ordered[-1]:
        return [True] * len(row), row[0]
    most = len(row) - 1 if max_relevant is None else min(max_relevant, len(row) - 1)
    best = max(
        range(1, most + 1), key=lambda n: between_variance(ordered[:n], ordered[n:])
    )  # the first of equals
    return [x >= ordered[best - 1] for x in row], float(ordered[best - 1])


def check(values: torch.Tensor, max_relevant: int | None, backend: str | None) -> None:
    split = otsu(values, max_relevant, backend=backend)
    rows = [by_hand(row, max_relevant) for row in values.tolist()]
    assert split.mask.tolist() == [mask for mask, _ in rows]
    assert split.count.tolist() == [sum(mask) for mask, _ in rows]
    assert split.threshold.tolist() == [threshold for _, threshold in rows]
    assert (split.mask.dtype, split.count.dtype) == (torch.bool, torch.int64)
    assert split.threshold.dtype == values.dtype


@on_every_backend
@pytest.mark.parametrize("max_relevant", [1, 5, 40, None])
@pytest.mark.parametrize("emotions", [1, 2, 3, 7, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_rows(backend, emotions, max_relevant, dtype):
    check(torch.randn(20, emotions, dtype=dtype), max_relevant, backend)


@on_every_backend
@pytest.mark.parametrize("max_relevant", [1, 2, 5, None])
def test_ties(backend, max_relevant):
    """Few distinct values, and P a power of two so that float64 is exact: equal values are never parted."""
    for emotions in (2, 4, 8, 16, 32):
        check(torch.randint(-2, 3, (25, emotions)).float() / 2, max_relevant, backend)


@on_every_backend
def test_far_from_zero(backend):
    """Sums in float64: in float32 the differences between the values would drown."""
    check(1000.0 + 0.01 * torch.randn(40, 32), None, backend)


@on_every_backend
def test_hand_written(backend):
    inputs = [
        # row, max_relevant, mask
        ([3.0, 0.0, 0.25, 2.75], 5, [True, False, False, True]),
        ([1.0, -1.0], 5, [True, False]),
        ([2.0, 1.0, 0.0], 5, [True, False, False]),  # a tie between one and two: the smaller
        ([5.0, 5.0, 5.0, 0.0], 1, [True, True, True, False]),  # a tie passes max_relevant
        ([-4.0, -4.0, -4.0], 1, [True, True, True]),
        ([0.0, -0.0], 5, [True, True]),
        ([7.0], 5, [True]),
        ([9.0, 1.0, 1.0, 1.0, 1.0], None, [True, False, False, False, False]),
        ([9.0, 9.0, 9.0, 9.0, 1.0], 3, [True, True, True, True, False]),
    ]
    for row, max_relevant, mask in inputs:
        split = otsu(torch.tensor([row]), max_relevant, backend=backend)
        assert split.mask.tolist() == [mask], row
        assert split.count.item() == sum(mask), row
        assert split.threshold.item() == min(x for x, m in zip(row, mask, strict=True) if m), row


@given(
    st.integers(1, 9).flatmap(
        lambda size: st.lists(st.floats(-8, 8, width=32), min_size=size, max_size=size)
    ),
    st.one_of(st.none(), st.integers(1, 10)),
)
def test_what_a_split_is(row, max_relevant):
    values = torch.tensor([row])
    split = otsu(values, max_relevant)
    mask = split.mask[0]
    assert mask.any()
    assert torch.equal(mask, values[0] >= split.threshold)
    if values.min() < values.max():
        assert not mask.all()
        if max_relevant is not None:
            assert int((values[0] > split.threshold).sum()) < max_relevant


@on_every_backend
def test_bits_equal_the_reference(backend):
    for shape in ((4000, 32), (7, 5), (3, 200)):
        for values in (
            torch.randn(shape),
            torch.randn(shape, dtype=torch.float64),
            torch.randint(0, 4, shape).float(),
        ):
            for max_relevant in (5, None):
                split = otsu(values, max_relevant, backend=backend)
                expected = otsu(values, max_relevant, backend="reference")
                assert all(torch.equal(a, b) for a, b in zip(split, expected, strict=True))


@on_every_backend
def test_strided_and_empty_batches(backend):
    values = torch.randn(32, 6).mT
    split, expected = otsu(values, backend=backend), otsu(values.contiguous(), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(split, expected, strict=True))
    assert otsu(torch.randn(1, 8).expand(3, -1), backend=backend).count.unique().numel() == 1
    assert otsu(torch.zeros(0, 5), backend=backend).mask.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    check(torch.randn(20, 32, dtype=dtype), 5, None)


@on_every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("emotions", [1, 8])
def test_not_finite(backend, bad, emotions):
    values = torch.randn(5, emotions)
    values[3, -1] = bad
    with pytest.raises(ValueError, match="otsu: values: row 3 is not finite"):
        otsu(values, backend=backend)


@pytest.mark.usefixtures("fresh_compile")
@on_every_backend
def test_not_finite_inside_torch_compile(backend):
    compiled = torch.compile(lambda x: otsu(x * 2, backend=backend).mask, fullgraph=True, backend="aot_eager")
    values = torch.randn(5, 8)
    assert torch.equal(compiled(values), otsu(values * 2).mask)
    values[1, 2] = float("nan")
    with pytest.raises(ValueError, match="row 1 is not finite"):
        compiled(values)


@pytest.mark.gpu
@on_every_backend
def test_not_finite_on_a_gpu(backend):
    values = torch.randn(3, 8, device="cuda")
    values[1, 2] = float("nan")
    reasons = backends.BACKENDS[backend].why_not("otsu", values)
    if reasons:
        pytest.skip("; ".join(reasons))
    split = otsu(values, backend=backend)
    assert not split.mask[1].any()
    assert split.count[1] == 0
    assert split.threshold[1].isnan()
    assert split.mask[[0, 2]].any(1).all()


@on_every_backend
def test_opcheck(backend):
    opcheck(torch.ops.ecore_kernels.otsu, (torch.randn(4, 8), 5, backend))


def test_is_not_differentiable():
    values = torch.randn(4, 8, requires_grad=True)
    assert not any(x.requires_grad for x in otsu(values))


@pytest.mark.parametrize(
    "values, max_relevant, message",
    [
        (torch.randn(8), 5, r"values: expected \[B, P\]"),
        (torch.randn(4, 0), 5, "with P >= 1"),
        (torch.zeros(4, 8, dtype=torch.int64), 5, "expected a float type"),
        (torch.randn(4, 8), 0, "max_relevant: expected at least 1 or None, got 0"),
    ],
)
def test_refuses(values, max_relevant, message):
    with pytest.raises(ValueError, match=message):
        otsu(values, max_relevant)


@on_every_backend
@pytest.mark.parametrize("max_relevant", [5, None])
@pytest.mark.parametrize("emotions", [2, 7, 33])
@pytest.mark.parametrize("largest", [1.7e308, 1e300, 1e-150, 1e-300, 1e-312])
def test_numbers_near_the_limits_of_float64(largest, emotions, max_relevant, backend):
    """Sums and squares that leave the range, and ones that vanish in it, are split as any others."""
    values = (torch.rand(20, emotions, dtype=torch.float64) * 2 - 1) * largest
    values[0] = largest  # all alike
    values[1, 1:] = 0.0
    values[2] = torch.arange(emotions, dtype=torch.float64) * -5e-324  # the smallest numbers that there are
    values[3, 0], values[3, 1:] = -largest, 1.0 + torch.rand(emotions - 1, dtype=torch.float64)
    check(values, max_relevant, backend)


@on_every_backend
@given(exponent=st.integers(-1000, 1000), seed=st.integers(0, 2**31))
def test_powers_of_two_change_no_split(exponent, seed, backend):
    torch.manual_seed(seed)
    values = torch.randint(-(2**20), 2**20, (17, 9)).double()
    near, far = (otsu(x, backend=backend) for x in (values, values * 2.0**exponent))
    assert torch.equal(near.mask, far.mask)
    assert torch.equal(near.threshold * 2.0**exponent, far.threshold)


@on_every_backend
@pytest.mark.parametrize(
    "values, max_relevant",
    [(torch.zeros(2, 0), 5), (torch.zeros(0, 0), 5), (torch.zeros(3), 5), (torch.zeros(2, 3), 0)],
    ids=["no emotions", "nothing", "a row", "no split"],
)
def test_the_registered_operator_refuses_what_has_no_split(values, max_relevant, backend):
    with pytest.raises(ValueError, match=r"^otsu: .*expected"):
        torch.ops.ecore_kernels.otsu(values, max_relevant, backend)
