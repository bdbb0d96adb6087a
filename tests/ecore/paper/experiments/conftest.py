"""The sample corpus, prepared, and `ecore reproduce` on it."""

import argparse
import os
from pathlib import Path

import pytest
import torch

from ecore.cli.reproduce import declare_reproduce, run_reproduce
from ecore.data.prepare import prepare
from ecore.demo import sample_corpus
from ecore.paper.experiments import runs
from tests.sizes import TINY_MODEL

SMALL = (*TINY_MODEL, "--log-every", "5", "--limit", "8", "--threads", "1", "--device", "cpu")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments") / "prepared"
    prepare(sample_corpus(), folder, vocabulary="train", progress=False)
    return folder


@pytest.fixture
def command(prepared, monkeypatch):
    """Run ``ecore reproduce`` on the sample corpus; processes that it starts find this package."""
    root = Path(__file__).parents[4]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(runs, "POLL", 0.02)
    threads = torch.get_num_threads()

    def call(*arguments):
        parser = argparse.ArgumentParser()
        declare_reproduce(parser)
        given = [*map(str, arguments), "--data", str(prepared), *SMALL]
        return run_reproduce(parser.parse_args(given))

    yield call
    torch.set_num_threads(threads)
