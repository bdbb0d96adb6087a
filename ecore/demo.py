"""Every step on the sample corpus, in minutes: prepare, train, evaluate, answer, check the operators."""

from __future__ import annotations

import importlib.resources
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ecore.config import PRESETS
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.statistics import describe
from ecore.errors import InputError
from ecore.evaluation.report import evaluate_run
from ecore.files import expect_folder
from ecore.pipeline import ECore
from ecore.training.trainer import train
from ecore_kernels import explain, graph_attention, otsu
from ecore_kernels.graph import EmotionGraph

QUESTIONS = (
    "I heard strange noises in the dark last night and I was so scared that I could not sleep.",
    "My daughter won first prize at the science fair. I am so proud of her!",
    "All my friends moved away and I eat dinner alone in my empty apartment every night.",
)
"""Contexts that the demo answers; none is in the sample corpus."""


def sample_corpus() -> Path:
    """The folder of the sample corpus that comes with the package: 448 conversations, 14 for each emotion."""
    return Path(str(importlib.resources.files("ecore.data") / "sample"))


def run(
    out: Path,
    *,
    strategy: str = "soft",
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Run the demo and leave a prepared folder and a trained run in ``out``.

    Args:
        out: a new or empty folder.
        strategy: "soft" or "hard".
        steps: training steps; None takes the ``tiny`` preset's.
        seed: seed of everything random.
        device: where to train.
        progress: show progress bars.

    Returns:
        The evaluation's metrics on the sample corpus's test split.

    Raises:
        InputError: ``out`` holds something, or a number out of range.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; expected a new or empty folder (choose another with --out)")
    expect_folder(out)
    if steps is not None and steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    begin = time.perf_counter()
    prepared, run_folder = out / "prepared", out / "run"

    _title("1. Prepare the sample corpus (448 short conversations, 32 emotions)")
    print(describe(prepare(sample_corpus(), prepared, vocabulary="train", progress=progress)))

    _title("2. Train a tiny model")
    data = PreparedData.load(prepared)
    model_config, training = PRESETS["tiny"]
    model_config = replace(
        model_config, strategy=strategy, thresholds=data.thresholds(model_config.thresholds)
    )
    training = replace(training, seed=seed, max_steps=steps or training.max_steps)
    train(run_folder, data, model_config, training, device=device, progress=progress)

    _title("3. Evaluate it on conversations that it has not seen")
    metrics = evaluate_run(run_folder, split="test", device=device, progress=progress)

    _title("4. Ask it")
    model = ECore.from_pretrained(run_folder, device=device)
    for question in QUESTIONS:
        reply = model.respond([question])
        print(f"you:   {question}")
        print(f"hears: {', '.join(f'{name} {share:.0%}' for name, share in reply.emotions[:3])}")
        print(f"says:  {reply}\n")

    _title("5. Check the operators on this machine")
    check_operators(torch.device(device))

    print(
        f"\nAll done in {time.perf_counter() - begin:.0f} s. Talk to the model, in the browser (pip install "
        f"'ecore[web]') or here:\n\n    ecore web {run_folder}\n    ecore chat {run_folder}\n"
    )
    print("On real data (EmpatheticDialogues), from an empty folder:\n")
    print("    ecore prepare --download --data ed --out ed-prepared")
    print("    ecore train --data ed-prepared --out ed-run --preset paper --strategy soft")
    return metrics


def check_operators(device: torch.device) -> None:
    """Compare what runs here with the reference on one random batch, and print what was compared."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 32, generator=generator).to(device)
    fast, oracle = otsu(values), otsu(values, backend="reference")
    equal = torch.equal(fast.mask, oracle.mask)
    print(
        f"{explain('otsu', values).splitlines()[0]}; same split as the reference: {'yes' if equal else 'NO'}"
    )

    intensity = 0.25 * torch.rand(4, 40, generator=generator)
    lengths = torch.tensor([40, 31, 17, 2])
    correlation = torch.randn(32, 32, generator=generator).softmax(-1)
    graph = EmotionGraph.from_intensity(
        intensity.to(device), lengths.to(device), (0.0, 0.075, 0.15), correlation.to(device)
    )
    query, key, value = torch.randn(3, 4, 3, 72, 100, generator=generator).to(device)
    run = graph_attention(query, key, value, graph, scale=0.1)
    exact = graph_attention(
        query.double(), key.double(), value.double(), graph, scale=0.1, backend="reference"
    )
    error = float((run.double() - exact).abs().max() / exact.abs().max())
    chosen = explain("graph_attention", query, key, value, graph).splitlines()[0]
    print(f"{chosen}; largest error against the float64 reference: {error:.1e}")


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")
