"""The example at its smallest: changed imports change neither losses nor weights, and a wrong layer is noticed."""

import functools

import pytest
import torch

from examples.drop_in import __main__ as drop_in
from examples.drop_in import fused, graph, layers, transformer

SMALLEST = ["--rounds", "8", "--words", "64", "--nodes", "4", "--batch-size", "2"]


def test_the_example(capsys, monkeypatch):
    monkeypatch.setattr(drop_in, "CHANGES", drop_in.CHANGES[3:])
    assert drop_in.main(SMALLEST) == 0
    printed = capsys.readouterr().out
    assert "transformer.py: from examples.drop_in.fused import VocabularyLoss" in printed
    assert "transformer, MultiHeadAttention + AddNorm + VocabularyLoss" in printed
    assert "graph, EdgeLayer" in printed


def test_a_wrong_layer_is_an_error(capsys, monkeypatch):
    right = fused.AddNorm.forward
    monkeypatch.setattr(
        fused.AddNorm, "forward", lambda self, x, y: tuple(1.001 * out for out in right(self, x, y))
    )
    monkeypatch.setattr(drop_in, "CHANGES", drop_in.CHANGES[1:2])
    assert drop_in.main(SMALLEST) == 1
    assert "drop_in: transformer, AddNorm: losses differ by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "before", "names"),
    [
        ("transformer", transformer.Dialogue, ["MultiHeadAttention", "AddNorm", "VocabularyLoss"]),
        ("graph", graph.GraphNetwork, ["EdgeLayer"]),
    ],
)
def test_the_new_imports_are_in_use_and_weights_load(name, before, names):
    module, lines = drop_in.changed(name, names)
    assert len(lines) == len(names)
    after = getattr(module, before.__name__)
    sizes = {"words": 64, "width": 12, "depth": 4, "filters": 5} if name == "transformer" else {"width": 6}
    one, other = before(**sizes), after(**sizes)
    other.load_state_dict(one.state_dict())
    for layer in names:
        assert any(type(part) is getattr(layers, layer) for part in one.modules())
        assert any(type(part) is getattr(fused, layer) for part in other.modules())
        assert not any(type(part) is getattr(layers, layer) for part in other.modules())


def test_gradients_are_the_same_in_float64():
    """Losses of a few steps hide a gradient that is missing from a small part."""
    for name, kind, names in drop_in.CHANGES[3:]:
        after, _ = drop_in.changed(name, names)
        before = {"transformer": transformer, "graph": graph}[name]
        sizes = {"words": 64, "dropout": 0.0} if name == "transformer" else {}
        data = drop_in.dialogues(64, 1, 2) if name == "transformer" else drop_in.graphs(4, 1, 2)
        batch = [part.double() if part.is_floating_point() else part for part in data[0]]
        make = [functools.partial(getattr(module, kind), **sizes) for module in (before, after)]
        gradients = []
        for model, _ in drop_in.pair(make):
            model.double()(*batch)[0].backward()
            gradients.append({key: p.grad for key, p in model.named_parameters()})
        for key, wanted in gradients[0].items():
            torch.testing.assert_close(gradients[1][key], wanted, rtol=1e-6, atol=1e-9, msg=f"{name}: {key}")


def test_bad_numbers_are_one_line(capsys):
    for given, line in (
        (["--rounds", "3"], "--rounds: expected at least 8, got 3"),
        (["--words", "5"], "--words: "),
    ):
        with pytest.raises(SystemExit) as stopped:
            drop_in.main(given)
        assert stopped.value.code == 2
        assert line in capsys.readouterr().err
