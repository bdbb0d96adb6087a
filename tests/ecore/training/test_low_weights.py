"""Low precision costs few casts: each weight once a step, heads that a fused attention takes, and the same training."""

import contextlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.workload import made_up_batch, workload
from ecore.model import transformer
from ecore.precision import LowWeights, autocast
from ecore.training import trainer
from ecore.training.schedule import adam
from ecore.training.trainer import Trainer, train
from tests.ecore.training.recordings import Again

SIZES = {"dim": 24, "heads": 2, "feed_forward": 32, "dropout": 0.0, "graph_dropout": 0.0}
VARIANTS = {
    "soft": {},
    "hard, copying": {"strategy": "hard", "copy": True, "emotion_start": True},
    "tied": {"tie_embeddings": True},
    "no graph": {"ablations": ("graph",)},
    "no guidance": {"ablations": ("co-g",)},
    "plain Transformer": {"strategy": "none"},
    "emotions without a graph": {"strategy": "none", "emotions": True, "emotion_start": True},
}


class Casts(TorchDispatchMode):
    """Counts by source: how often each parameter's values are written in another type, and ``calls`` in all."""

    def __init__(self, model):
        super().__init__()
        self._names = {weight.data_ptr(): name for name, weight in model.named_parameters()}
        self.weights, self.calls, self.output_layers = Counter(), 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        # The loss casts the output layer inside of its operator, once a call.
        self.output_layers += operation is torch.ops.ecore_kernels.fused_linear_cross_entropy.default
        sources, targets = [], []
        if operation is torch.ops.aten._to_copy.default:
            sources, targets = [args[0]], [result]
        elif operation is torch.ops.aten.copy_.default:
            sources, targets = [args[1]], [args[0]]
        elif operation is torch.ops.aten._foreach_copy_.default:
            sources, targets = args[1], args[0]
        casts = [a for a, b in zip(sources, targets, strict=True) if a.dtype != b.dtype]
        self.calls += bool(casts)
        self.weights.update(self._names[a.data_ptr()] for a in casts if a.data_ptr() in self._names)
        return result


def made(preset="paper", **settings):
    """A model of a preset's blocks and layers, small otherwise."""
    return workload(None, preset, number=1).model(**SIZES | settings)


def step(model, low, batch, tokens, keep_casts=False):
    with autocast("cpu", "bfloat16", keep_casts), low():
        loss = model.loss(batch, True, tokens).total
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_each_weight_is_cast_once_a_step(settings):
    model = made(**settings)
    low, (batch, tokens) = LowWeights(model, "bfloat16"), made_up_batch(4, seed=0)
    step(model, low, batch, tokens)  # the operators settle how their calls run, once, with casts of their own
    model.zero_grad()
    with Casts(model) as casts:
        step(model, low, batch, tokens)
    assert set(casts.weights.values()) == {1}
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    used = {n for n, w in model.named_parameters() if w.grad is not None and n.rpartition(".")[0] in linear}
    assert used <= set(casts.weights) | {"output.weight", "output.bias"}
    assert casts.output_layers == 1
    # Autocast casts one by one, some of them twice: the second pass over the graph has the first one's weights.
    with Casts(model) as others:
        step(model, contextlib.nullcontext, batch, tokens)
    assert others.calls > 1.7 * casts.calls
    if "graph" not in settings.get("ablations", ()) and settings.get("strategy") != "none":
        assert max(others.weights.values()) == (1 if "co-g" in settings.get("ablations", ()) else 2)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_weights_and_gradients_stay_what_they_were(settings):
    model = made("baseline", **settings)
    before = {name: id(weight) for name, weight in model.named_parameters()}
    low, (batch, tokens) = LowWeights(model, "bfloat16"), made_up_batch(4, seed=0)
    with low():
        assert model.encoder.blocks[0].attention.query.weight.dtype == torch.bfloat16
        assert model.embedding.word.weight.dtype == model.output.weight.dtype == torch.float32
        assert model.encoder.norm.weight.dtype == torch.float32
    with pytest.raises(KeyError), low():
        raise KeyError
    step(model, low, batch, tokens)
    assert {name: id(weight) for name, weight in model.named_parameters()} == before
    mine = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(g is None or g.dtype == torch.float32 for g in mine.values())
    model.zero_grad()
    step(model, contextlib.nullcontext, batch, tokens)
    theirs = {name: weight.grad for name, weight in model.named_parameters()}
    assert {n for n, g in mine.items() if g is None} == {n for n, g in theirs.items() if g is None}


@pytest.mark.parametrize("recorded, accumulate", [(False, 1), (False, 2), (True, 1)])
def test_a_training_casts_each_weight_once_a_step(
    data, tiny, settings, monkeypatch, tmp_path, recorded, accumulate
):
    """A validation casts it once too, in however many batches; the output layer's is cast once a batch."""
    seen = {"_take_step": [], "_validate": []}
    for name, found in seen.items():
        method = getattr(Trainer, name)

        def watched(self, method=method, found=found):
            with Casts(self.model) as casts:
                result = method(self)
            found.append(casts)
            return result

        monkeypatch.setattr(Trainer, name, watched)
    if recorded:
        monkeypatch.setattr(trainer, "recorder", lambda *_, **__: Again())
    settings = replace(
        settings, precision="bfloat16", max_steps=4, accumulate=accumulate, cuda_graphs=recorded
    )
    train(tmp_path / "run", data, tiny, settings, progress=False)
    assert len(seen["_take_step"]) == 4
    assert seen["_validate"]
    for name, found in seen.items():
        for casts in found:
            assert set(casts.weights.values()) == {1}
            assert not {"output.weight", "output.bias"} & set(casts.weights)
            assert casts.output_layers == (accumulate if name == "_take_step" else 2)


def test_float32_has_no_copies():
    model = made("baseline")
    weight = model.encoder.blocks[0].attention.query.weight
    for precision in ("float32", "tf32"):
        with LowWeights(model, precision)():
            assert model.encoder.blocks[0].attention.query.weight is weight


def test_losses_and_gradients_are_autocasts():
    """Eight steps beside autocast's own casts and beside float32, from which both differ by as much."""
    ways = {"exact": "float32", "autocast": "bfloat16", "low": "bfloat16"}
    models = {way: made("baseline") for way in ways}
    optimizers = {way: adam(model.parameters()) for way, model in models.items()}
    losses = {way: [] for way in ways}
    for number in range(8):
        batch, tokens = made_up_batch(4, seed=number)
        for way, precision in ways.items():
            optimizers[way].param_groups[0]["lr"] = 1e-3
            low = LowWeights(models[way], precision if way == "low" else "float32")
            with autocast("cpu", precision, keep_casts=way == "autocast"), low():
                loss = models[way].loss(batch, False, tokens).total
            loss.backward()
            losses[way].append(float(loss.detach()))
            if number == 0:
                gradients = {w: {n: p.grad for n, p in m.named_parameters()} for w, m in models.items()}
        if number == 0:
            for name, exact in gradients["exact"].items():
                if exact is not None:
                    noise, error = (
                        float((gradients[way][name] - exact).norm()) for way in ("autocast", "low")
                    )
                    assert error <= 2 * noise + 1e-2 * float(exact.norm()), name
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    np.testing.assert_allclose(losses["low"], losses["autocast"], rtol=5e-3)
    np.testing.assert_allclose(losses["low"], losses["exact"], rtol=5e-3)
    assert losses["low"] != losses["exact"]


def test_masked_heads_are_padded_for_a_fused_attention(monkeypatch, as_on_a_gpu):
    """On a GPU in low precision, that is; the choice of it is in one function, which stands for one here."""
    sizes = Counter()
    attention = F.scaled_dot_product_attention

    def watched(queries, keys, values, attn_mask=None, **options):
        widths = tuple(x.shape[-1] for x in (queries, keys, values))
        sizes[attn_mask is not None, widths] += 1
        return attention(queries, keys, values, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    queries, keys, values = torch.randn(3, 2, 3, 7, 100, requires_grad=True)
    mask = torch.rand(2, 1, 1, 7) < 0.7
    mask[..., 0] = True
    plain = transformer._attention(queries, keys, values, attn_mask=mask)
    monkeypatch.setattr(transformer, "_pads_heads", lambda x: x.shape[-1] % 8 != 0)
    padded = transformer._attention(queries, keys, values, attn_mask=mask)
    assert padded.shape == plain.shape
    torch.testing.assert_close(padded, plain)
    grads = [torch.autograd.grad(out.square().sum(), (queries, keys, values)) for out in (plain, padded)]
    torch.testing.assert_close(*grads)
    assert sizes == {(True, (100,) * 3): 1, (True, (104,) * 3): 1}
    sizes.clear()
    model = made("paper", dim=300, heads=3)
    step(model, LowWeights(model, "bfloat16"), *made_up_batch(2, seed=0))
    # Four blocks each: masked in the encoder and across, causal in the decoder, for which flash attention pads.
    assert sizes == {(True, (104,) * 3): 8, (False, (100,) * 3): 4}


@pytest.mark.parametrize(
    "cuda, dtype, size, pads",
    [
        (True, torch.bfloat16, 100, True),
        (True, torch.float16, 20, True),
        (True, torch.bfloat16, 64, False),
        (True, torch.float32, 100, False),
        (False, torch.bfloat16, 100, False),
    ],
)
def test_heads_that_need_padding(cuda, dtype, size, pads):
    class Queries:
        is_cuda = cuda
        shape = (2, 3, 7, size)

    Queries.dtype = dtype
    assert transformer._pads_heads(Queries()) == pads
