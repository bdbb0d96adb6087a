"""Material that campaigns damage and kill: a corpus, a prepared folder, a run and what commands made of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from tests.sizes import TINY_MODEL

FEELINGS = {
    "afraid": ("a terrible noise scared me", "that sounds frightening"),
    "angry": ("someone broke my awful car", "that would annoy me too"),
    "joyful": ("we had a wonderful happy party", "how lovely for you"),
    "sad": ("my old dog died and i cried", "i am so sorry"),
}
# Most of the time goes into files: a checkpoint each step, all intervals at odds.
TRAINING = (
    *TINY_MODEL,
    *("--batch-size", "10", "--max-steps", "5", "--warmup", "4", "--factor", "0.5", "--dropout", "0.1"),
    *("--log-every", "1", "--validate-every", "3", "--checkpoint-every", "1", "--threads", "1"),
    *("--literal-thresholds",),
)
TEXT = "my old dog died and i cried."


@dataclass(frozen=True)
class Material:
    """Folders that commands made, each with what it is for."""

    root: Path

    corpus = property(lambda self: self.root / "corpus")
    csv = property(lambda self: self.root / "csv")
    prepared = property(lambda self: self.root / "prepared")
    run = property(lambda self: self.root / "run")
    annotated = property(lambda self: self.root / "annotated")
    study = property(lambda self: self.root / "study")
    glove = property(lambda self: self.root / "glove.txt")
    predictions = property(lambda self: self.run / "evaluation-test/predictions.jsonl")


def conversations(split: str, number: int) -> list[tuple[str, str, str, list[str]]]:
    """Dialogues of four turns: id, emotion, situation, turns."""
    picks = random.Random(split)
    found = []
    for i in range(number):
        emotion = list(FEELINGS)[i % 4]
        said, answer = FEELINGS[emotion]
        extra = " ".join(
            picks.choices(["today", "again", "really", "very", "outside", "at", "home"], k=i % 5)
        )
        turns = [f"{said} {extra}.", f"{answer}. what happened?", f"it was {extra} bad.", f"{answer}."]
        found.append((f"{split}:{i}", emotion, f"{said}.", turns))
    return found


def write_corpus(folder: Path, official: bool) -> None:
    """Write the corpus as JSON lines, or as the official CSV."""
    folder.mkdir()
    for split, number in (("train", 24), ("valid", 8), ("test", 8)):
        if official:
            text = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"
            for conv_id, emotion, situation, turns in conversations(split, number):
                for i, turn in enumerate(turns, 1):
                    text += f"{conv_id},{i},{emotion},{situation},{8 - i % 2},{turn},5|5|5_2|2|5,\n"
            (folder / f"{split}.csv").write_text(text)
            continue
        lines = []
        for conv_id, emotion, situation, turns in conversations(split, number):
            said = [{"speaker": ("speaker", "listener")[i % 2], "text": turn} for i, turn in enumerate(turns)]
            record = {"conv_id": conv_id, "emotion": emotion, "situation": situation, "utterances": said}
            lines.append(json.dumps(record) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))


def make(root: Path) -> Material:
    """Make all of it in ``root``, an empty folder."""
    material = Material(root)
    write_corpus(material.corpus, official=False)
    write_corpus(material.csv, official=True)
    words = sorted({word for said in FEELINGS.values() for text in said for word in text.split()})
    material.glove.write_text("".join(f"{word} {i % 3} -0.5 1e-1\n" for i, word in enumerate(words)))
    (root / "relations.tsv").write_text("dog\tRelatedTo\tcar\t2.0\nnoise\tCauses\tparty\t1.5\n")
    (root / "vad.tsv").write_text("word\tscore\ndog\t0.7\nawful\t0.1\n")
    prepare = ["prepare", "--data", "corpus", "--out", "prepared", "--glove", "glove.txt"]
    train = ["train", "--data", "prepared", "--out", "run", *TRAINING]
    annotate = ["annotate", "run", "--data", "prepared", "--annotator", "file", "--labels", "labels.jsonl"]
    predictions = "run/evaluation-test/predictions.jsonl"
    export = ["human", "export", f"A={predictions}", "B=other.jsonl", "--contexts", "4", "--raters", "2"]
    said(prepare, root)
    said(train, root)
    said(["evaluate", "run", "--threads", "1"], root)
    said(["generate", "run", "--text", TEXT, "--threads", "1"], root)
    records = [json.loads(line) for line in (root / predictions).read_text().splitlines()]
    for i, record in enumerate(records):
        record["prediction"] = f"that is answer {i} ."
        record.pop("prediction_tokens")
    (root / "other.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    labels = [
        {"conv_id": c, "emotions": [e, "sad" if e != "sad" else "angry"]}
        for c, e, *_ in conversations("test", 8)
    ]
    (root / "labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels))
    said([*annotate, "--out", "annotated"], root)
    said([*export, "--out", "study"], root)
    for sheet in sorted(material.study.glob("rater-*/*.csv")):
        lines = sheet.read_text(encoding="utf-8-sig").splitlines()
        mark = '"A"' if sheet.name.startswith("ab") else '"4","3","5"'
        blank = ',""' * (mark.count(",") + 1)
        done = [lines[0], *(line.removesuffix(blank) + "," + mark for line in lines[1:])]
        (root / sheet.name).write_text("\n".join(done) + "\n")
    return material


def make_backbone(material: Material) -> None:
    """Make a tiny GPT-2 with a tokenizer of its own in ``gpt2``, and a run on it in ``gpt2-run``."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for texts in FEELINGS.values() for text in texts], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(material.root / "gpt2")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(fast), "n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(material.root / "gpt2")
    train = ["train", "--data", "prepared", "--out", "gpt2-run", "--backbone", "gpt2", "--preset", "tiny"]
    steps = ["--dim", "12", "--max-steps", "2", "--batch-size", "8", "--threads", "1"]
    said([*train, *steps], material.root)


def said(argv: list[str], cwd: Path) -> None:
    """Run a command that has to succeed, in this process: so children find imported what it needs."""
    from ecore.cli import main

    before, words = Path.cwd(), io.StringIO()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            code = main(argv)
    finally:
        os.chdir(before)
    if code:
        raise RuntimeError(f"ecore {' '.join(argv)}: {words.getvalue()}")
