"""Weights of files that were written before the perceiver was a part of its own."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from ecore import pretrained
from ecore.model.weights import present_name, read_weights


def older_name(name: str) -> str:
    for old, new in (
        ("correlation.", "perceiver.correlation."),
        ("graph.", "perceiver.graph_network."),
        ("perceptron.", "perceiver.perceptron."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def test_older_files_are_read(make, tmp_path):
    model = make.model()
    pretrained.save(model, tmp_path)
    path = pretrained.weights_file(tmp_path, "last")
    now = load_file(path)
    older = {older_name(name): value for name, value in now.items()}
    assert sum(name not in now for name in older) > 20
    save_file(older, path)
    assert read_weights(path).keys() == now.keys()
    loaded = pretrained.load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_names_of_now_stay(make):
    names = list(make.model().state_dict())
    assert [present_name(name) for name in names] == names
