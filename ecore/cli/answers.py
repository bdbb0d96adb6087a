"""``ecore generate`` and ``ecore chat``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecore.cli.common import (
    BATCH,
    add_answering,
    decoding_options,
    expect_default,
    expect_method,
    files_of_run,
    load,
    shown,
)
from ecore.errors import InputError


def declare_generate(parser: argparse.ArgumentParser) -> None:
    """Answer a dialogue given on the command line, or every context of a split.

    Several --text are the turns of one dialogue, the speaker's first and then alternating.

    examples:
      ecore generate run --text "I lost my keys and I am so annoyed."
      ecore generate run --text "My dog died." --text "I am so sorry." --text "He was twelve." --method beam
      ecore generate run --split test --out answers.jsonl
      ecore generate run --text "I got the job!" --method sample --top-p 0.9 --seed 1
    """
    add_answering(parser)
    parser.add_argument(
        "--text", action="append", metavar="TURN", help="one turn of the dialogue; repeat for more"
    )
    parser.add_argument("--split", choices=("train", "valid", "test"), help="answer this split instead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --split: JSON lines to write")
    parser.add_argument(
        "--data", type=Path, metavar="PREPARED", help="with --split: prepared folder (default: the run's own)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=BATCH, metavar="N", help="with --split: samples at once"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="with --split: only the first N samples")


def run_generate(arguments: argparse.Namespace) -> int:
    if (arguments.text is None) == (arguments.split is None):
        raise InputError("generate: expected either --text TURN or --split NAME --out FILE")
    options = decoding_options(arguments)
    expect_method(options)
    if arguments.text is not None:
        why = "goes with --split, not with --text"
        expect_default(arguments, why, data=None, out=None, limit=None, batch_size=BATCH)
        answering = load(arguments)
        reply = answering.respond(arguments.text, **options)
        print(reply)
        if reply.emotions:
            print(f"perceived: {shown(reply.emotions)}")
        return 0
    if arguments.out is None:
        raise InputError("--out: expected a file for the answers of --split")
    from ecore.data.prepared import PreparedData
    from ecore.evaluation.predictions import write_predictions
    from ecore.files import expect_apart
    from ecore.generation.decoding import Decoding
    from ecore.pretrained import data_folder

    folder = arguments.data or data_folder(arguments.folder)
    of_data = (
        folder / "vocabulary.json",
        folder / "meta.json",
        *folder.glob("*.texts.jsonl"),
        *folder.glob("*.npy"),
    )
    expect_apart(arguments.out, [*files_of_run(arguments.folder), *of_data])
    data = PreparedData.load(folder)
    model = load(arguments).model
    if data.vocabulary.fingerprint != model.vocabulary.fingerprint:
        raise InputError(f"{folder}: not the vocabulary that {arguments.folder} was trained with")
    records = write_predictions(
        model,
        getattr(data, arguments.split),
        arguments.out,
        Decoding(**options),
        arguments.batch_size,
        arguments.limit,
    )
    print(
        f"{arguments.out}: {len(records):,} answers; score them: ecore evaluate --predictions {arguments.out}"
    )
    return 0


def declare_chat(parser: argparse.ArgumentParser) -> None:
    """Talk with a model; the emotions that it perceives stand beside each answer.

    It remembers the dialogue. Commands: /undo takes the last exchange back, /reset forgets the dialogue, /emotions
    shows what was perceived in it, /method beam (or greedy, sample) changes how the next answers are found, /help
    lists them; /quit, Ctrl-D or Ctrl-C leaves. Lines may come from a pipe.

    examples:
      ecore chat run
      ecore chat run --method sample --top-p 0.9 --temperature 0.8
      ecore chat run --transcript dialogue.jsonl
      printf 'I failed my exam.\nI studied so hard.\n' | ecore chat run
    """
    add_answering(parser)
    parser.add_argument(
        "--transcript", type=Path, metavar="FILE", help="append every exchange to this file, a JSON line each"
    )


def run_chat(arguments: argparse.Namespace) -> int:
    from ecore.cli.chat import Chat
    from ecore.files import expect_apart

    options = decoding_options(arguments)
    if arguments.transcript is not None:
        expect_apart(arguments.transcript, files_of_run(arguments.folder), "--transcript")
        with arguments.transcript.open("a", encoding="utf-8"):
            pass  # a file that cannot be written should be said before anything is
    return Chat(load(arguments), options, arguments.transcript).run()
