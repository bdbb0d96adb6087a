"""Every setting refuses what its field cannot be: from Python, from config.json and from flags alike."""

import json
import math
import typing
from dataclasses import fields

import pytest
import torch

from ecore import cli
from ecore.config import ModelConfig, TrainingConfig, from_dict
from ecore.data.prepare import prepare
from ecore.demo import sample_corpus
from ecore.errors import InputError
from ecore.generation.decoding import Decoding

FIELDS = [(cls, item.name) for cls in (ModelConfig, TrainingConfig, Decoding) for item in fields(cls)]
WRONG = {
    int: ["3", 1.5, True, [], {}, math.nan, math.inf, 10**5000, -(10**30), 2**64],
    float: ["3", True, [], {}, math.nan, math.inf, -math.inf, 10**5000, 1e308, -1e308],
    bool: [1, 0.0, "yes", [], {}],
    str: [3, True, [], {}, math.nan],
    tuple: [3, "co-p", {}, ["co-p", 3], [0.0, math.nan], [0.0, math.inf], [0.0, "x"], [[]]],
}


def kind(cls, name):
    hint = typing.get_type_hints(cls)[name]
    known = [typing.get_origin(k) or k for k in (hint, *typing.get_args(hint))]
    return next(k for k in known if k in WRONG)


@pytest.mark.parametrize("cls, name", FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_field_refuses_what_it_cannot_be(cls, name):
    for value in WRONG[kind(cls, name)]:
        given = tuple(value) if isinstance(value, list) and kind(cls, name) is tuple else value
        for use in (lambda: cls(**{name: given}), lambda: from_dict(cls, {name: value})):  # noqa: B023
            with pytest.raises(InputError, match=f"^{name}: expected [^\n]*$") as error:
                use()
            assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "cls, options",
    [
        (TrainingConfig, {"factor": -1.0}),
        (TrainingConfig, {"factor": 0.0}),
        (ModelConfig, {"heads": 0}),
        (ModelConfig, {"dim": 6 * 10**12}),
        (ModelConfig, {"thresholds": (0.0, -0.1, 0.2)}),
        (Decoding, {"method": "beam", "beams": 2**63}),
        (Decoding, {"method": "sample", "temperature": 1e-46}),
        (Decoding, {"method": "beam", "length_penalty": 300.0}),
    ],
)
def test_ranges(cls, options):
    with pytest.raises(InputError, match=f"^{[*options][-1]}: expected"):
        cls(**options)


def test_whole_numbers_are_numbers():
    assert ModelConfig(dropout=0, gamma_emotion=2).gamma_emotion == 2
    assert from_dict(TrainingConfig, json.loads('{"factor": 1}')).factor == 1


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "prepared"
    prepare(sample_corpus(), folder, progress=False)
    return folder


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("--factor", "-1"), "factor: expected a number over 0"),
        (("--factor", "nan"), "factor: expected a number over 0"),
        (("--heads", "0"), "heads: expected at least 1, got 0"),
        (("--dim", "6000000000000"), "dim: expected at most 65,536"),
        (("--seed", str(2**63)), "seed: expected a number in"),
    ],
)
def test_flags_are_refused_in_one_line(prepared_folder, tmp_path, capsys, flags, complaint):
    command = ["train", "--data", str(prepared_folder), "--out", str(tmp_path / "run"), *flags]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ecore: error: {complaint}")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_threads_are_counted(capsys):
    assert cli.main(["demo", "--threads", "1000000"]) == 2
    assert "threads: expected at most 1,024, got 1000000" in capsys.readouterr().err


def test_full_memory_is_a_line(monkeypatch, capsys):
    def fill(arguments):
        torch.empty(2**60)

    summary, declare, _ = cli.COMMANDS["info"]
    monkeypatch.setitem(cli.COMMANDS, "info", (summary, declare, fill))
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err.startswith("ecore: error: memory is full; try")
