"""``ecore annotate``."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecore.errors import InputError

if TYPE_CHECKING:
    import threading

    from ecore.paper.annotation.annotators import Annotator


def declare_annotate(parser: argparse.ArgumentParser) -> None:
    """Label dialogues with several emotions, as the paper's Appendix H does: annotate, screen, review.

    EmpatheticDialogues names one emotion a dialogue. The multi-emotion subset of the paper's Table 3 is made in
    three steps:
      run         an annotator names emotions; dialogues with several, the true one among them, stay
      review      a person strikes mistaken labels on a CSV sheet; what is left is the subset
      agreement   how far annotators agree

    examples:
      ecore annotate run --data prepared --split test --annotator lexicon --out annotated
      (mark mistaken labels with an x in annotated/review.csv)
      ecore annotate review annotated --out multi.jsonl
      ecore evaluate run --multi-emotion multi.jsonl

    each step has its own page:  ecore annotate run --help
    """
    steps = parser.add_subparsers(title="steps", metavar="STEP", dest="step", required=True)
    for name, (summary, declare, _) in STEPS.items():
        description, _, epilog = (inspect.getdoc(declare) or "").partition("\n\n")
        declare(
            steps.add_parser(
                name,
                help=summary,
                description=description,
                epilog=epilog,
                formatter_class=parser.formatter_class,
            )
        )


def run_annotate(arguments: argparse.Namespace) -> int:
    return STEPS[arguments.step][2](arguments)


def _declare_run(parser: argparse.ArgumentParser) -> None:
    """Name the emotions of every dialogue of a split, and keep those with several, the true one among them.

    annotators:
      lexicon    counts the emotion words of the paper's Table 12; at once, and coarse
      endpoint   asks a language model behind any OpenAI-compatible API. Answers are kept as they come: after Ctrl-C
                 or an error the same command continues. The key comes from the environment variable
                 OPENAI_API_KEY; without it none is sent. The dialogues of the split are sent to that address.
      file       takes JSON lines of {"conv_id", "emotions"}; of several files, what --votes of them name

    FOLDER then holds annotations.jsonl (all that was said), labels.jsonl (screened), review.csv (for a person)
    and summary.json.

    examples:
      ecore annotate run --data prepared --annotator lexicon --out lexicon
      ecore annotate run --data prepared --annotator endpoint --url http://localhost:8000/v1 --model llama --out llama
      ecore annotate run --data prepared --annotator file --labels mine.jsonl hers.jsonl --votes 2 --out ours
    """
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a corpus, or what `ecore prepare` made of it",
    )
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="test", help="what to annotate"
    )
    parser.add_argument(
        "--annotator", choices=("lexicon", "endpoint", "file"), required=True, help="who names the emotions"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where files go")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N dialogues")
    endpoint = parser.add_argument_group("annotator endpoint")
    endpoint.add_argument("--url", metavar="URL", help="the API's address, up to /v1")
    endpoint.add_argument("--model", metavar="NAME", help="the model's name there")
    endpoint.add_argument("--jobs", type=int, metavar="N", help="requests at once (default: 4)")
    files = parser.add_argument_group("annotator file")
    files.add_argument(
        "--labels", type=Path, nargs="+", action="extend", metavar="FILE", help="JSON lines of labels"
    )
    files.add_argument(
        "--votes",
        type=int,
        metavar="N",
        help="files that must name an emotion for it to count (default: 1)",
    )


def _run(arguments: argparse.Namespace) -> int:
    import threading

    from ecore.files import expect_apart, make_folder
    from ecore.paper.annotation import pipeline

    _check_flags(arguments)
    conversations, emotions = pipeline.read_conversations(arguments.data, arguments.split)
    if arguments.limit is not None:
        if arguments.limit < 1:
            raise InputError(f"--limit: expected at least 1, got {arguments.limit}")
        conversations = conversations[: arguments.limit]
    out = arguments.out
    for name in ("annotations.jsonl", "labels.jsonl"):
        expect_apart(out / name, arguments.labels or ())
    make_folder(out)
    stopped = threading.Event()
    annotator = _annotator(arguments, emotions, stopped)
    jobs = (arguments.jobs or 4) if arguments.annotator == "endpoint" else 1
    try:
        summary = pipeline.run(conversations, annotator, out, jobs, stopped)
    except KeyboardInterrupt:
        if arguments.annotator == "endpoint":
            print(f"\n{out}: answers so far are kept; start the same command again to go on")
        raise
    print(_summary(summary, arguments.split))
    unknown = getattr(annotator, "unknown_names", 0)
    if unknown:
        print(f"{unknown:,} names in the answers are no known emotion and were left out")
    if summary["problems"]:
        conv_id, why = next(iter(summary["problems"].items()))
        print(f"{len(summary['problems']):,} dialogues without an annotation, {conv_id} first: {why}")
        if arguments.annotator == "endpoint":
            print("the same command requests them again")
    print(
        f"next: mark mistaken labels with an x in {out / 'review.csv'}, then "
        f"ecore annotate review {out} --out multi.jsonl"
    )
    return 0


def _check_flags(arguments: argparse.Namespace) -> None:
    needed = {"endpoint": ("url", "model"), "file": ("labels",), "lexicon": ()}
    for annotator, flags in needed.items():
        for flag in flags:
            given = getattr(arguments, flag) is not None
            if given != (annotator == arguments.annotator):
                what = "goes with" if given else "is needed for"
                raise InputError(f"--{flag}: {what} --annotator {annotator}")
    for flag, annotator in (("jobs", "endpoint"), ("votes", "file")):
        number = getattr(arguments, flag)
        if number is not None and annotator != arguments.annotator:
            raise InputError(f"--{flag}: goes with --annotator {annotator}")
        if number is not None and number < 1:
            raise InputError(f"--{flag}: expected at least 1, got {number}")


def _annotator(
    arguments: argparse.Namespace, emotions: tuple[str, ...], stopped: threading.Event
) -> Annotator:
    if arguments.annotator == "lexicon":
        from ecore.paper.annotation.lexicon import LexiconAnnotator

        return LexiconAnnotator(emotions)
    if arguments.annotator == "file":
        from ecore.paper.annotation.annotators import FileAnnotator

        return FileAnnotator(arguments.labels, emotions, arguments.votes or 1)
    from ecore.paper.annotation.endpoint import KEY, EndpointAnnotator

    cache = arguments.out / "answers.jsonl"
    key = os.environ.get(KEY) or None
    return EndpointAnnotator(arguments.url, arguments.model, emotions, cache, key, stopped)


def _summary(summary: dict[str, Any], split: str) -> str:
    from ecore.paper.published import APPENDIX_H

    rows = [
        (f"dialogues of {split}", "conversations"),
        ("annotated", "annotated"),
        ("with several emotions", "several"),
        ("the true one among them", "screened"),
    ]
    lines = [f"{'by ' + summary['annotator']:<27}{'here':>9}{'the paper':>12}"]
    lines += [f"{name:<27}{summary[key]:>9,}{_number(APPENDIX_H.get(key)):>12}" for name, key in rows]
    lines.append(f"{'after review':<27}{'-':>9}{APPENDIX_H['reviewed']:>12,}")
    mean = summary["labels_per_sample"]
    shown = "-" if mean is None else f"{mean:.2f}"
    lines.append(f"{'emotions each':<27}{shown:>9}{APPENDIX_H['labels_per_sample']:>12.2f}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _declare_review(parser: argparse.ArgumentParser) -> None:
    """Read reviewed sheets back and write the labels that are left, ready for `ecore evaluate --multi-emotion`.

    the sheet:
      FOLDER/review.csv has a row for each label that an annotator added to the true emotion. An x in the column
      strike strikes it; nothing else may be changed, and no row may be missing. A dialogue without a label
      left drops out.
      Of several reviewers, each with a copy of the sheet, half must strike a label for it to go; their agreement
      is printed.

    examples:
      ecore annotate review annotated --out multi.jsonl
      ecore annotate review annotated --sheet anna.csv ben.csv carla.csv --out multi.jsonl
    """
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder made by `ecore annotate run`")
    parser.add_argument(
        "--sheet",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="reviewed sheets (default: FOLDER/review.csv)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines to write")


def _review(arguments: argparse.Namespace) -> int:
    from ecore.evaluation.multi_emotion import read_multi_emotion, write_labels
    from ecore.files import expect_apart, expect_file
    from ecore.paper.annotation.agreement import alpha
    from ecore.paper.annotation.review import decisions, read_sheet, strike

    expect_file(arguments.out)
    labels = read_multi_emotion(arguments.folder / "labels.jsonl")
    sheets = {
        str(path): read_sheet(path, labels) for path in arguments.sheet or [arguments.folder / "review.csv"]
    }
    expect_apart(arguments.out, [arguments.folder / "labels.jsonl", *map(Path, sheets)])
    kept = strike(labels, list(sheets.values()))
    if not kept:
        raise InputError("every label was struck; expected some to be left")
    write_labels(arguments.out, kept)
    for name, sheet in sheets.items():
        print(f"{name}: {sum(sheet.values()):,} of {len(sheet):,} labels struck")
    if len(sheets) > 1:
        agreed = alpha(decisions(sheets))
        print(f"agreement of the reviewers: Krippendorff's alpha {_alpha(agreed)}")
    mean = sum(map(len, kept.values())) / len(kept)
    print(f"{arguments.out}: {len(kept):,} of {len(labels):,} dialogues are left, {mean:.2f} emotions each")
    print(f"next: ecore evaluate RUN --multi-emotion {arguments.out}")
    return 0


def _declare_agreement(parser: argparse.ArgumentParser) -> None:
    """Say how far two or more annotators agree on the dialogues that they have in common.

    what is counted:
      alpha     Krippendorff's, with the MASI distance between sets of emotions: 1 is agreement, 0 chance
      overlap   mean share of the emotions named by either that both name (Jaccard)
      same      dialogues on which both name the very same emotions

    examples:
      ecore annotate agreement llama/annotations.jsonl gpt/annotations.jsonl
      ecore annotate agreement lexicon/annotations.jsonl llama/annotations.jsonl gpt/annotations.jsonl
    """
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON lines of labels")


def _agreement(arguments: argparse.Namespace) -> int:
    from ecore.evaluation.multi_emotion import read_labels
    from ecore.paper.annotation.agreement import label_agreement

    names = [str(path) for path in arguments.files]
    if len(set(names)) < len(names):
        raise InputError("agreement: the same file twice; expected files of different annotators")
    files = {str(path): {i: e for _, i, e in read_labels(path)} for path in arguments.files}
    result = label_agreement(files)
    for name, mean in result["emotions_per_sample"].items():
        print(f"{name}: {len(files[name]):,} dialogues, {mean:.2f} emotions each")
    print(f"\n{'dialogues':>9}{'alpha':>8}{'overlap':>9}{'same':>9}")
    for pair in result["pairs"]:
        shared = f"{pair['conversations']:>9,}{_alpha(pair['alpha']):>8}"
        print(f"{shared}{pair['jaccard']:>9.2f}{pair['same']:>7.2f} %  {' and '.join(pair['names'])}")
    if len(files) > 2:
        print(f"{'all':>9}{_alpha(result['alpha']):>8}")
    return 0


def _alpha(value: float | None) -> str:
    return "not defined (everything is the same)" if value is None else f"{value:.3f}"


STEPS: dict[
    str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
] = {
    "run": ("annotate a split and screen it", _declare_run, _run),
    "review": ("read reviewed sheets back", _declare_review, _review),
    "agreement": ("how far annotators agree", _declare_agreement, _agreement),
}
