"""``ecore generate`` and ``ecore chat``."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from ecore.cli.common import add_answering, decoding_options, load
from ecore.errors import InputError

SHOWN_EMOTIONS = 3


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
        "--batch-size", type=int, default=64, metavar="N", help="with --split: samples at once"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="with --split: only the first N samples")


def run_generate(arguments: argparse.Namespace) -> int:
    if (arguments.text is None) == (arguments.split is None):
        raise InputError("generate: expected either --text TURN or --split NAME --out FILE")
    options = decoding_options(arguments)
    if arguments.text is not None:
        for flag in [f for f in ("data", "out", "limit") if getattr(arguments, f) is not None]:
            raise InputError(f"--{flag}: goes with --split, not with --text")
        answering = load(arguments)
        reply = answering.respond(arguments.text, **options)
        print(reply)
        if reply.emotions:
            print(f"perceived: {_perceived(reply.emotions)}")
        return 0
    if arguments.out is None:
        raise InputError("--out: expected a file for the answers of --split")
    from ecore.data.prepared import PreparedData
    from ecore.evaluation.predictions import write_predictions
    from ecore.generation.decoding import Decoding
    from ecore.model.pretrained import data_folder

    folder = arguments.data or data_folder(arguments.folder)
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


def _perceived(emotions: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in emotions[:SHOWN_EMOTIONS])


def declare_chat(parser: argparse.ArgumentParser) -> None:
    """Talk with a model; the emotions that it perceives stand beside each answer.

    It remembers the dialogue. /reset forgets it; /quit, Ctrl-D or Ctrl-C leaves. Lines may come from a pipe.

    examples:
      ecore chat run
      ecore chat run --method sample --top-p 0.9 --temperature 0.8
      printf 'I failed my exam.\\nI studied so hard.\\n' | ecore chat run
    """
    add_answering(parser)


def run_chat(arguments: argparse.Namespace) -> int:
    options = decoding_options(arguments)
    model = load(arguments)
    asks = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text should not end the dialogue
    if asks:
        print("Tell me about it. (/reset forgets the dialogue, /quit leaves.)")
    turns: list[str] = []
    try:
        while True:
            line = input("you: " if asks else "").strip()
            if line == "/quit":
                return 0
            if line == "/reset":
                turns = []
                print("(forgotten)")
            elif line.startswith("/"):
                print("(commands: /reset, /quit)")
            elif line:
                reply = model.respond([*turns, line], **options)
                turns += [line, str(reply)]
                perceived = f"\n       [{_perceived(reply.emotions)}]" if reply.emotions else ""
                print(f"ecore: {reply}{perceived}", flush=True)
    except (EOFError, KeyboardInterrupt):
        if asks:
            print("\nGoodbye.")
        return 0
