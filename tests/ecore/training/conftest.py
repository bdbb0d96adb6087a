"""A corpus and a model small enough to train in a blink."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecore.config import ModelConfig, TrainingConfig
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.training import cuda_graphs, trainer
from ecore.training.journal import read_metrics
from ecore.training.trainer import train

FEELINGS = {
    "afraid": ("a terrible noise scared me", "that sounds frightening"),
    "angry": ("someone broke my awful car", "that would annoy me too"),
    "joyful": ("we had a wonderful happy party", "how lovely for you"),
    "sad": ("my old dog died and i cried", "i am so sorry"),
}

TINY = ModelConfig(dim=12, encoder_blocks=1, decoder_blocks=1, feed_forward=16)


def write_corpus(folder: Path) -> Path:
    """Conversations of four turns, two samples each; 42 in valid, over four of a test's batches."""
    picks = random.Random(0)
    folder.mkdir()
    for split, number in (("train", 24), ("valid", 21), ("test", 6)):
        lines = []
        for i in range(number):
            emotion = list(FEELINGS)[i % 4]
            said, answer = FEELINGS[emotion]
            extra = " ".join(
                picks.choices(
                    ["today", "yesterday", "again", "really", "very", "outside", "at", "home"], k=i % 5
                )
            )
            turns = [f"{said} {extra}.", f"{answer}. what happened?", f"it was {extra} bad.", f"{answer}."]
            utterances = [
                {"speaker": ("speaker", "listener")[t % 2], "text": text} for t, text in enumerate(turns)
            ]
            lines.append(
                {
                    "conv_id": f"{split}:{i}",
                    "emotion": emotion,
                    "situation": f"{said}.",
                    "utterances": utterances,
                }
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    prepare(write_corpus(folder / "corpus"), folder / "prepared", progress=False)
    return folder / "prepared"


@pytest.fixture(scope="session")
def data(prepared_folder):
    return PreparedData.load(prepared_folder)


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side, and bit-for-bit claims are for one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_trial(monkeypatch):
    """The precision that a test names needs no seconds of measurement."""
    monkeypatch.setattr("ecore.training.trainer.settle", lambda precision, device: (precision, None))


@pytest.fixture
def settings():
    """Two epochs and a bit of 48 samples in batches of 10, with every interval at odds with the others."""
    return TrainingConfig(
        batch_size=10, max_steps=13, warmup=4, log_every=3, validate_every=5, checkpoint_every=4, factor=0.5
    )


TIMES = ("samples_per_second", "seconds_per_step", "peak_memory_mib", "valid_seconds")


@pytest.fixture
def numbers():
    """The log of a run without what differs from one run to the next: times and memory."""
    return lambda run: [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run)]


@pytest.fixture(scope="session")
def tiny():
    return TINY


@pytest.fixture
def quiet_train(data, tiny, settings):
    def run(folder, training=None, **options):
        if not options.get("resume"):
            options = {"model_config": tiny, "training": training or settings} | options
        return train(folder, options.pop("data", data), progress=False, **options)

    return run


@pytest.fixture
def reference(quiet_train, tmp_path):
    """A run that was never stopped."""
    quiet_train(tmp_path / "reference")
    return tmp_path / "reference"


@pytest.fixture
def narrow(monkeypatch):
    """Several shapes in a corpus of short texts."""
    monkeypatch.setattr(cuda_graphs, "LEAST_CONTEXT", 8)
    monkeypatch.setattr(cuda_graphs, "LEAST_RESPONSE", 8)
    monkeypatch.setattr(cuda_graphs, "LEAST_TOKENS", 16)


@pytest.fixture
def graphs(settings):
    return replace(settings, cuda_graphs=True)


@pytest.fixture
def start(data, tiny, monkeypatch):
    """Trains in a folder, steps through the given recorder where there is one."""

    def run(folder, training=None, records=None, device="cpu", **options):
        if not options.get("resume"):
            options = {"model_config": tiny, "training": training} | options
        with monkeypatch.context() as patched:
            if records is not None:
                patched.setattr(trainer, "recorder", lambda *_, **__: records)
            return train(folder, data, device=device, progress=False, **options)

    return run


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Attention is by text and position, so that no size depends on a batch's words."""
    monkeypatch.setattr("ecore.model.packing.attends_among_rows", lambda x: False)
