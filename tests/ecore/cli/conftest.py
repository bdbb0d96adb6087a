"""A corpus, its prepared folder and a run, all made by the commands."""

import json

import pytest
import torch

from ecore import cli
from tests.ecore.cli.commands import SMALL


@pytest.fixture(scope="module", autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "corpus"
    folder.mkdir()
    said = {"afraid": "A noise scared me.", "joyful": "We won the game!", "sad": "My dog died."}
    for split, number in (("train", 12), ("valid", 3), ("test", 3)):
        lines = []
        for i in range(number):
            emotion = sorted(said)[i % 3]
            texts = [said[emotion], "Tell me more.", "It was last night.", "I see."]
            utterances = [{"speaker": ("speaker", "listener")[t % 2], "text": x} for t, x in enumerate(texts)]
            lines.append(
                {
                    "conv_id": f"{split}{i}",
                    "emotion": emotion,
                    "situation": texts[0],
                    "utterances": utterances,
                }
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def prepared(corpus):
    assert cli.main(["prepare", "--data", str(corpus), "--out", str(corpus.parent / "prepared")]) == 0
    return corpus.parent / "prepared"


@pytest.fixture(scope="session")
def run(prepared):
    folder = prepared.parent / "run"
    assert cli.main(["train", "--data", str(prepared), "--out", str(folder), *SMALL, "--max-steps", "6"]) == 0
    return folder
