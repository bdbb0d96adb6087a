"""A tiny GPT-2 with a tokenizer of its own, and data to train on, all made here; nothing is fetched."""

import dataclasses
import json

import pytest
import torch

from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.pretrained import build
from tests.ecore.model.gpt2.tiny import TINY

FEELINGS = {
    "afraid": ("A terrible noise scared me", "That sounds frightening, doesn't it?"),
    "angry": ("Someone broke my awful car", "That'd annoy me too!"),
    "joyful": ("We've had a wonderful, happy party", "How lovely for you."),
    "sad": ("My old dog died and I cried", "I'm so sorry."),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twenty conversations of four turns a split; one of a test's opens with a blank turn."""
    folder = tmp_path_factory.mktemp("backbone")
    (folder / "corpus").mkdir()
    for split in ("train", "valid", "test"):
        lines = []
        for i in range(20):
            emotion = list(FEELINGS)[i % 4]
            said, answer = FEELINGS[emotion]
            more = " ".join(["really"] * (i % 3) + ["today"] * (i % 5))
            turns = [f"{said}  {more}.", f"{answer} What happened?", f"It was {more} bad.", answer]
            if split == "test" and i == 0:
                turns[0] = " "
            said_by = [{"speaker": ("speaker", "listener")[t % 2], "text": x} for t, x in enumerate(turns)]
            dialogue = {
                "conv_id": f"{split}:{i}",
                "emotion": emotion,
                "situation": said,
                "utterances": said_by,
            }
            lines.append(json.dumps(dialogue) + "\n")
        (folder / "corpus" / f"{split}.jsonl").write_text("".join(lines))
    prepare(folder / "corpus", folder / "prepared", progress=False)
    return PreparedData.load(folder / "prepared")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """A GPT-2 with random weights and a byte-level tokenizer of some 400 tokens, as transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("gpt2")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for texts in FEELINGS.values() for text in texts], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(fast), n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make(data, gpt2_folder, tmp_path):
    """``make(**settings)``: a model in eval mode; ``joined``: its guidance's way into GPT-2 no longer 0."""

    def model(joined=True, **settings):
        torch.manual_seed(1)
        config = dataclasses.replace(TINY, **{"backbone": str(gpt2_folder), **settings})
        made = build(config, data, tmp_path / "none").eval()
        if joined and made.join_guidance is not None:
            torch.nn.init.normal_(made.join_guidance.weight, std=0.5)
        return made

    return model
