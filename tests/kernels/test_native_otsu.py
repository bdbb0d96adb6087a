"""The compiled OTSU against a slow one that is written from the definition, here and independently."""

import threading

import numpy as np
import pytest
import torch

from ecore_kernels import native
from ecore_kernels.native_kernels import otsu as native_otsu
from tests.kernels.forking import in_forked_child, needs_fork

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.fixture(autouse=True)
def _skip_without_cuda(request):
    if request.node.get_closest_marker("gpu"):
        reason = (
            native_otsu.why_not(torch.empty(1, 1, device="cuda"))
            if torch.cuda.is_available()
            else "no CUDA device"
        )
        if reason:
            pytest.skip(reason)


def slow_otsu(values: np.ndarray, max_relevant: int | None):
    """Row by row and value by value, in Python floats (doubles)."""
    masks, counts, thresholds = [], [], []
    for row in values:
        ordered = sorted((float(value) for value in row), reverse=True)
        size = len(ordered)
        sums = [0.0]
        for value in ordered:
            sums.append(sums[-1] + value)
        mean = sums[-1] / size
        best, best_score = 1, -1.0
        for n in range(1, min(max_relevant or size, size - 1) + 1):
            score = (sums[n] - n * mean) ** 2 / (n * (size - n))
            if score > best_score:
                best, best_score = n, score
        threshold = ordered[best - 1]
        masks.append([float(value) >= threshold for value in row])
        counts.append(sum(masks[-1]))
        thresholds.append(threshold)
    return np.array(masks), np.array(counts), np.array(thresholds, dtype=values.dtype)


def assert_splits(values: torch.Tensor, max_relevant: int | None):
    mask, count, threshold = native_otsu.otsu(values, max_relevant)
    want_mask, want_count, want_threshold = slow_otsu(values.cpu().numpy(), max_relevant)
    assert (mask.dtype, count.dtype, threshold.dtype) == (torch.bool, torch.int64, values.dtype)
    np.testing.assert_array_equal(mask.cpu().numpy(), want_mask)
    np.testing.assert_array_equal(count.cpu().numpy(), want_count)
    np.testing.assert_array_equal(threshold.cpu().numpy(), want_threshold)


def random(rows: int, columns: int, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_relevant", [None, 1, 5, 100])
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 16, 31, 32, 33, 64, 65, 100])
def test_random_rows(columns, max_relevant, dtype, device):
    for rows in (1, 15, 16, 17, 50):  # around the number of rows that are worked on together
        assert_splits(random(rows, columns, dtype, device, seed=rows), max_relevant)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [7, 32, 100])
def test_ties(columns, device):
    coarse = (random(200, columns) * 2).round() / 2
    assert_splits(coarse.to(device), 5)
    assert_splits(coarse.to(device), None)
    _, count, _ = native_otsu.otsu(coarse.to(device), 1)
    assert count.max() > 1  # equal values are never parted


@pytest.mark.parametrize("device", DEVICES)
def test_every_order_of_few_values(device):
    """All rows of length 5 over three values: every pattern of ties and every input order."""
    values = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 2.0])] * 5).to(device)
    assert_splits(values, None)
    assert_splits(values, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [1, 2, 32, 33, 100])
@pytest.mark.parametrize("value", [0.1, -3.0, 0.0])
def test_constant_rows_are_relevant_as_a_whole(columns, value, device):
    values = torch.full((3, columns), value, device=device)
    mask, count, threshold = native_otsu.otsu(values, 5)
    assert mask.all()
    assert count.tolist() == [columns] * 3
    assert torch.equal(threshold, values[:, 0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1e30])
def test_extreme_magnitudes(scale, device):
    assert_splits(random(20, 32, device=device) * scale, 5)
    assert_splits(random(20, 32, torch.float64, device) * scale - 7 * scale, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [255, 256, 257, 1023, 1024])
def test_long_rows(columns, device):
    assert_splits(random(5, columns, device=device), 5)
    assert_splits(random(5, columns, torch.float64, device), None)


def test_longer_than_cuda_takes():
    assert_splits(random(18, 3000), None)


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device):
    wide = random(40, 64, device=device)
    transposed = random(32, 40, device=device).t()
    for values in (wide[:, 3:35], wide[::3], wide[:, ::2], transposed, wide[:1].expand(40, 64), wide[5:5]):
        before = values.clone()
        assert_splits(values, 5) if len(values) else native_otsu.otsu(values, 5)
        assert torch.equal(values, before)
    assert native_otsu.otsu(wide[5:5], 5)[0].shape == (0, 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "row", "column"), [(5, 3, 0), (5, 0, 31), (20_000, 16_321, 7)])
def test_not_finite_names_the_first_row_on_cpu(bad, dtype, rows, row, column):
    values = random(rows, 32, dtype)
    values[row, column] = bad
    values[row + 1 :: 2, 2] = bad
    with pytest.raises(ValueError, match=rf"row {row} is not finite"):
        native_otsu.otsu(values, 5)


@gpu
@pytest.mark.parametrize("columns", [1, 32, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_empties_the_row_on_cuda(bad, columns):
    values = random(50, columns, device="cuda")
    clean = native_otsu.otsu(values, 5)
    values[7, columns // 2] = bad
    mask, count, threshold = native_otsu.otsu(values, 5)
    assert not mask[7].any()
    assert count[7] == 0
    assert threshold[7].isnan()
    others = torch.arange(50, device="cuda") != 7
    for got, want in zip((mask, count, threshold), clean, strict=True):
        assert torch.equal(got[others], want[others])


@gpu
def test_cuda_follows_the_current_stream():
    values = random(4096, 32, device="cuda")
    want = native_otsu.otsu(values, 5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = values.new_zeros(values.shape)
        late.copy_(values)
        got = native_otsu.otsu(late, 5)
    stream.synchronize()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@gpu
def test_too_wide_for_cuda_is_refused():
    values = random(2, 1025, device="cuda")
    assert "1024" in native_otsu.why_not(values)
    with pytest.raises(RuntimeError, match="1024"):
        native_otsu.otsu(values, 5)


def test_refusals_give_the_reason():
    assert native_otsu.why_not(torch.zeros(2, 3)) is None
    assert "bfloat16" in native_otsu.why_not(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert "meta" in native_otsu.why_not(torch.zeros(2, 3, device="meta"))
    with pytest.raises(RuntimeError, match="int64"):
        native_otsu.otsu(torch.zeros(2, 3, dtype=torch.int64), 5)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def threads():
    """Sets torch's number of threads, which the extension follows, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_nothing(threads):
    values = random(30_001, 32)
    threads(1)
    want = native_otsu.otsu(values, 5)
    for number in (2, 3, 8):
        threads(number)
        assert equal(native_otsu.otsu(values, 5), want)


def test_several_python_threads_at_once(threads):
    threads(3)
    inputs = [random(20_000, 32, seed=seed) for seed in range(4)]
    want = [native_otsu.otsu(values, 5) for values in inputs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(20):
            if not equal(native_otsu.otsu(inputs[index], 5), want[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child(threads):
    """A fork copies the pool's locks, held or not, but no thread of it: a child that used them would hang."""
    threads(2)
    values = random(1100, 32)  # just enough for two threads, so that the pool's locks are taken often
    want = int(native_otsu.otsu(values, 5)[1].sum())
    stop = threading.Event()

    def keep_the_pool_busy() -> None:
        while not stop.is_set():
            native_otsu.otsu(values, 5)

    busy = [threading.Thread(target=keep_the_pool_busy) for _ in range(3)]
    for thread in busy:
        thread.start()

    def count() -> list[int]:
        return [int(native_otsu.otsu(values, 5)[1].sum()) for _ in range(20)]

    try:
        for _ in range(30):
            assert in_forked_child(count) == [want] * 20
    finally:
        stop.set()
        for thread in busy:
            thread.join()


def test_compiled_code_may_ask_whether_a_cuda_device_is_refused() -> None:
    """The answer comes out of the extension, which torch.compile cannot trace."""

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if native_otsu._cuda_refusal(0) else x

    expected = chosen(torch.ones(2))
    assert torch.equal(torch.compile(chosen, fullgraph=True, backend="eager")(torch.ones(2)), expected)
