"""Runs that nothing trains, and what a user who brings nothing brings."""

from dataclasses import replace
from pathlib import Path

from ecore.config import PRESETS
from ecore.paper.experiments.plan import Brought, Run

NOTHING = Brought("vader", False, {})


def fake_runs(variant, seeds):
    model, training = PRESETS["tiny"]
    return [
        Run(variant, s, Path(f"runs/{variant.name}-seed{s}"), Path("data"), model, replace(training, seed=s))
        for s in range(seeds)
    ]
