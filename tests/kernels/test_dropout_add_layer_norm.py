"""Dropout, residual and LayerNorm in one, against torch's LayerNorm and the mask that the docstring describes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ecore_kernels import backends, dropout_add_layer_norm, explain, native
from ecore_kernels.philox import philox_words

SEED = 0x123456789ABCDEF0


def problem(*shape, dtype=torch.float64, requires_grad=True):
    shapes = (shape, shape, shape[-1:], shape[-1:])
    return [torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


def expected(x, residual, weight, bias, p, seed=SEED):
    """Both results with the mask made an element at a time."""
    flat = x.reshape(-1, x.shape[-1])
    kept = torch.empty(flat.shape, dtype=torch.bool)
    for row in range(len(flat)):
        for column in range(flat.shape[1]):
            words = philox_words(seed, torch.tensor(column // 4), row, 0, 0)
            kept[row, column] = int(words[column % 4]) >= round(p * 2**32)
    dropped = torch.where(kept.view(x.shape).to(x.device), x / (1.0 - p) if p < 1.0 else 0.0 * x, 0.0)
    total = residual + dropped
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


@pytest.mark.usefixtures("backend")
class TestOnEveryBackend:
    @pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 17), (2, 64), (5, 67), (1, 300), (40, 5)])
    def test_results_and_gradients(self, shape, p):
        leaves = problem(*shape)
        found = dropout_add_layer_norm(*leaves, p, seed=SEED)
        wanted = expected(*leaves, p)
        torch.testing.assert_close(found, wanted)
        upstream = [torch.randn_like(y) for y in wanted]
        got = torch.autograd.grad(found, leaves, upstream)
        torch.testing.assert_close(got, torch.autograd.grad(wanted, leaves, upstream))

    @pytest.mark.parametrize("which", [0, 1])
    def test_one_result_alone(self, which):
        leaves = problem(4, 9)
        found, wanted = dropout_add_layer_norm(*leaves, 0.3, seed=SEED)[which], expected(*leaves, 0.3)[which]
        grads = [torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (found, wanted)]
        for ours, right in zip(*grads, strict=True):
            if right is None:  # the sum does not depend on weight and bias
                assert ours is None or not ours.any()
            else:
                torch.testing.assert_close(ours, right)

    def test_without_weight_and_bias(self):
        x, residual, _, _ = problem(4, 9)
        found, wanted = (
            f(x, residual, None, None, 0.3)
            for f in (lambda *a: dropout_add_layer_norm(*a, seed=SEED), expected)
        )
        torch.testing.assert_close(found, wanted)
        got = torch.autograd.grad(found[0].square().sum() + found[1].sum(), (x, residual))
        right = torch.autograd.grad(wanted[0].square().sum() + wanted[1].sum(), (x, residual))
        torch.testing.assert_close(got, right)

    def test_float32_is_as_exact_as_torchs(self):
        leaves = problem(6, 300, dtype=torch.float32)
        exact = [y.detach().double().requires_grad_() for y in leaves]
        found, plain, wanted = (
            dropout_add_layer_norm(*leaves, 0.2, seed=SEED),
            expected(*leaves, 0.2),
            expected(*exact, 0.2),
        )
        upstream = [torch.randn_like(y) for y in found]
        grads = [
            torch.autograd.grad(ys, at, [u.to(ys[0].dtype) for u in upstream])
            for ys, at in ((found, leaves), (plain, leaves), (wanted, exact))
        ]
        for ours, torchs, right in zip(
            (*found, *grads[0]), (*plain, *grads[1]), (*wanted, *grads[2]), strict=True
        ):
            assert (ours - right).norm() <= 2 * (torchs - right).norm() + 1e-6 * right.norm()

    def test_it_is_the_same_bits_again(self):
        leaves = problem(70, 33, dtype=torch.float32)

        def once():
            found = dropout_add_layer_norm(*leaves, 0.3, seed=SEED)
            return *found, *torch.autograd.grad(found[0].square().sum(), leaves)

        assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))

    def test_what_is_dropped_is_not_read(self):
        x, residual, weight, bias = problem(3, 50, requires_grad=False)
        _, total = dropout_add_layer_norm(x, torch.zeros_like(x), weight, bias, 0.5, seed=SEED)
        x[total == 0.0] = torch.nan
        normed, total = dropout_add_layer_norm(x, residual, weight, bias, 0.5, seed=SEED)
        assert normed.isfinite().all()
        assert total.isfinite().all()

    def test_empty(self):
        leaves = problem(0, 5)
        normed, total = dropout_add_layer_norm(*leaves, 0.5)
        assert normed.shape == total.shape == (0, 5)
        gradients = torch.autograd.grad(normed.sum() + total.sum(), leaves)
        assert not any(g.any() for g in gradients)

    def test_gradcheck(self):
        leaves = problem(3, 6)

        def results(*leaves):
            return dropout_add_layer_norm(*leaves, 0.4, seed=SEED)

        assert torch.autograd.gradcheck(results, leaves)
        assert torch.autograd.gradgradcheck(results, leaves)

    def test_opcheck(self):
        tensors = problem(5, 7, requires_grad=False)
        seed, name = torch.tensor(3), backends.named()
        ops = torch.ops.ecore_kernels
        torch.library.opcheck(ops.fused_dropout_add_layer_norm, (*tensors, seed, 0.3, 1e-5, name))
        _, total, saved = ops.fused_dropout_add_layer_norm(*tensors, seed, 0.3, 1e-5, name)
        rest = (seed, 0.3, [True, True, True, False], name)
        torch.library.opcheck(
            ops.fused_dropout_add_layer_norm_backward, (total, None, total, saved, tensors[2], *rest)
        )

    def test_compiled_without_a_break(self):
        leaves = problem(9, 13, dtype=torch.float32)

        def step(x, residual, weight, bias):
            normed, total = dropout_add_layer_norm(torch.tanh(x), residual, weight, bias, 0.3, seed=SEED)
            return (normed * total).sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (9, 4):
            given = [leaves[0][:rows], leaves[1][:rows], *leaves[2:]]
            got, wanted = compiled(*given), step(*given)
            torch.testing.assert_close(got, wanted)
            torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves))


# Of one backend ---------------------------------------------------------------------------------------------


needs_native = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())


@needs_native
def test_sums_are_the_same_bits_on_every_backend():
    leaves = problem(9, 67, dtype=torch.float32, requires_grad=False)
    totals = [dropout_add_layer_norm(*leaves, 0.2, seed=-5, backend=b)[1] for b in ("native", "reference")]
    assert torch.equal(*totals)


@needs_native
def test_threads_change_no_bit():
    leaves = problem(150, 37, dtype=torch.float32)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = dropout_add_layer_norm(*leaves, 0.3, seed=SEED, backend="native")
        found.append((*results, *torch.autograd.grad(results[0].square().sum(), leaves)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_seeds():
    leaves = problem(8, 40, requires_grad=False)
    one = dropout_add_layer_norm(*leaves, 0.5, seed=1)[1]
    assert torch.equal(one, dropout_add_layer_norm(*leaves, 0.5, seed=torch.tensor(1))[1])
    assert not torch.equal(one, dropout_add_layer_norm(*leaves, 0.5, seed=2)[1])
    assert torch.equal(
        dropout_add_layer_norm(*leaves, 0.5, seed=-1)[1],
        dropout_add_layer_norm(*leaves, 0.5, seed=2**64 - 1)[1],
    )
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(dropout_add_layer_norm(*leaves, 0.5)[1])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_evaluation_drops_nothing():
    x, residual, weight, bias = problem(4, 9, requires_grad=False)
    normed, total = dropout_add_layer_norm(x, residual, weight, bias, 0.5, training=False)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, F.layer_norm(total, (9,), weight, bias))


@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_types(kinds, name):
    x, residual, weight, bias = problem(4, 30, dtype=torch.float32)
    low = x.detach().to(kinds[0]).requires_grad_(), residual.detach().to(kinds[1]).requires_grad_()
    normed, total = dropout_add_layer_norm(*low, weight, bias, 0.3, seed=SEED, backend=name)
    assert normed.dtype is total.dtype is kinds[1]
    wanted = dropout_add_layer_norm(
        *(y.float() for y in low), weight, bias, 0.3, seed=SEED, backend="reference"
    )
    torch.testing.assert_close((normed.float(), total.float()), wanted, rtol=0.01, atol=0.01)
    gradients = torch.autograd.grad(normed.float().sum() + total.float().sum(), (*low, weight, bias))
    assert [g.dtype for g in gradients] == [*kinds, torch.float32, torch.float32]


def test_layouts_vmap_and_forward_mode():
    x, residual, weight, bias = problem(4, 6, requires_grad=False)
    turned = x.T.contiguous().T
    plain = dropout_add_layer_norm(x, residual, weight, bias, 0.3, seed=SEED)
    torch.testing.assert_close(dropout_add_layer_norm(turned, residual, weight, bias, 0.3, seed=SEED), plain)
    many = torch.randn(3, 4, 6, dtype=torch.float64)

    def first(x):
        return dropout_add_layer_norm(x, residual, weight, bias, 0.3, seed=SEED)[0].square().sum()

    torch.testing.assert_close(torch.func.vmap(first)(many), torch.stack([first(y) for y in many]))
    gradient = torch.func.grad(first)
    torch.testing.assert_close(torch.func.vmap(gradient)(many), torch.stack([gradient(y) for y in many]))
    _, tangent = torch.func.jvp(first, (x,), (many[0],))
    torch.testing.assert_close(tangent, (gradient(x) * many[0]).sum())


WRONG = {
    "x: expected [..., D] with D >= 1, got [3, 0]": {"x": torch.randn(3, 0)},
    "residual: expected [3, 4], got [3, 5]": {"residual": torch.randn(3, 5)},
    "weight: expected [4], got [3]": {"weight": torch.ones(3)},
    "p: expected 0 to 1, got 1.5": {"p": 1.5},
    "p: expected a number, got str": {"p": "0.1"},
    "seed: expected an int, a tensor or None, got float": {"seed": 0.5},
    "seed: expected 64 bits, got 18446744073709551616": {"seed": 2**64},
    "seed: expected an int64 scalar, got int32 [1]": {"seed": torch.zeros(1, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_one_line(message):
    given = {"x": torch.randn(3, 4), "residual": torch.randn(3, 4), "weight": None, "bias": None, "p": 0.1}
    with pytest.raises(ValueError) as raised:
        dropout_add_layer_norm(**(given | WRONG[message]))
    assert str(raised.value) == f"dropout_add_layer_norm: {message}"


def test_explain():
    assert explain(dropout_add_layer_norm, *problem(3, 4), 0.1).startswith("dropout_add_layer_norm: ")
