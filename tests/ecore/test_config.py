"""Settings: what is refused, the way to JSON and back, and the flags made from them."""

import argparse
import json
from dataclasses import fields, replace

import pytest

from ecore.config import PRESETS, ModelConfig, TrainingConfig, add_arguments, from_dict, overrides, to_dict
from ecore.errors import InputError


def parsed(cls, *flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser, cls)
    return overrides(parser.parse_args(flags), cls)


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_survive_json(preset):
    for config in PRESETS[preset]:
        config = replace(
            config, **({"ablations": ("co-p",)} if isinstance(config, ModelConfig) else {"patience": 3})
        )
        assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_the_papers_numbers():
    model, training = PRESETS["paper"]
    assert (model.dim, model.encoder_blocks, model.decoder_blocks, model.heads) == (300, 4, 4, 3)
    assert (model.graph_layers, model.thresholds) == (2, (0.0, 0.075, 0.15))
    assert (training.batch_size, training.warmup, training.factor) == (16, 8000, 1.0)


def test_what_the_released_command_trains_and_what_its_rivals_are():
    released, _ = PRESETS["released"]
    assert (released.encoder_blocks, released.decoder_blocks, released.thresholds) == (4, 4, (0.0, 0.15))
    assert released.copy
    assert released.emotion_start
    assert released.graph_form == "released"
    assert released.own_emotions
    baseline, _ = PRESETS["baseline"]
    assert (baseline.encoder_blocks, baseline.decoder_blocks) == (1, 1)
    assert not baseline.copy
    assert not baseline.emotion_start
    for config in (released, baseline):
        assert (config.heads, config.attention_dim, config.feed_forward, config.dropout) == (2, 40, 50, 0.0)
        assert config.dim == 300


@pytest.mark.parametrize(
    "options, what",
    [
        ({"strategy": "medium"}, "strategy: expected one of soft, hard"),
        ({"ablations": ("co-p", "co-q")}, "ablations: expected one of .*'co-q'"),
        ({"thresholds": (0.1, 0.2, 0.3)}, "thresholds: expected the first to be 0"),
        ({"thresholds": ()}, "thresholds"),
        ({"dim": 100}, "dim: 100 cannot be split into 3"),
        ({"heads": 7}, "heads: a width of 300"),
        ({"attention_dim": 40}, "heads: a width of 40"),
        ({"graph_layers": 0}, "graph_layers: expected at least 1"),
        ({"dropout": 1.0}, "dropout: expected a number in"),
        ({"emotions": True}, "emotions: strategy soft predicts them anyway; expected strategy none"),
        ({"strategy": "none", "emotions": True, "backbone": "gpt2"}, "emotions: of no use with a backbone"),
        ({"strategy": "none", "emotion_start": True}, "emotion_start: strategy none predicts no emotions"),
        ({"feed_forward": -5}, "feed_forward: expected at least 1, got -5"),
        ({"attention_dim": -3}, "attention_dim: expected at least 1, got -3"),
        ({"attention_dim": 0}, "attention_dim: expected at least 1, got 0"),
    ],
)
def test_models_that_cannot_be(options, what):
    with pytest.raises(InputError, match=what):
        ModelConfig(**options)


@pytest.mark.parametrize(
    "options, what",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"log_every": 0}, "log_every"),
        ({"validate_limit": 0}, "validate_limit: expected at least 1, got 0"),
        ({"patience": 0}, "patience"),
        ({"seed": -1}, r"seed: expected a number in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, "seed"),
        ({"precision": "int8"}, "precision"),
    ],
)
def test_trainings_that_cannot_be(options, what):
    with pytest.raises(InputError, match=what):
        TrainingConfig(**options)


def test_an_older_config_keeps_what_it_was():
    """Fields that it lacks take the value of its time, not the default of now."""
    written = to_dict(ModelConfig())
    for name, before in (("own_weight", False), ("graph_bias", True)):
        assert written.pop(name) is not before
        assert getattr(from_dict(ModelConfig, written), name) is before
    assert from_dict(ModelConfig, written) == ModelConfig(own_weight=False, graph_bias=True)
    assert from_dict(TrainingConfig, {}) == TrainingConfig()


def test_unknown_setting():
    with pytest.raises(InputError, match="ModelConfig: unknown setting 'width'"):
        from_dict(ModelConfig, {"width": 3})


def test_flags_that_are_not_given_override_nothing():
    assert parsed(ModelConfig) == {}
    assert parsed(TrainingConfig) == {}


def test_flags():
    given = parsed(
        ModelConfig,
        "--dim",
        "30",
        "--thresholds",
        "0",
        "0.1",
        "--no-graph-norm",
        "--ablations",
        "co-p",
        "co-g",
    )
    assert given == {"dim": 30, "thresholds": (0.0, 0.1), "graph_norm": False, "ablations": ("co-p", "co-g")}
    assert parsed(TrainingConfig, "--factor", "2", "--patience", "4") == {"factor": 2.0, "patience": 4}


def test_every_setting_is_a_flag_with_help_and_default():
    parser = argparse.ArgumentParser()
    add_arguments(parser, ModelConfig, skip=("ablations",))
    add_arguments(parser, TrainingConfig)
    shown = " ".join(parser.format_help().split())
    for item in (*fields(ModelConfig), *fields(TrainingConfig)):
        assert ("--" + item.name.replace("_", "-") in shown) == (item.name != "ablations")
    assert "(default: 0.0 0.075 0.15)" in shown
    assert "(default: on)" in shown


def test_the_package_offers_the_model():
    import ecore
    from ecore import ECore
    from ecore.pipeline import ECore as same

    assert ECore is same
    with pytest.raises(AttributeError, match="nothing"):
        _ = ecore.nothing
