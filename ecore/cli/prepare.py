"""``ecore prepare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecore.cli.common import expect_default


def declare_prepare(parser: argparse.ArgumentParser) -> None:
    """Turn a corpus into a prepared folder: words, vocabulary, emotion intensities, word vectors. Done once.

    the corpus:
      FOLDER holds train, valid and test, each as .jsonl or as EmpatheticDialogues' official .csv.
      With --download the official archive is fetched into FOLDER first.

    examples:
      ecore prepare --data empatheticdialogues --out prepared --glove glove.6B.100d.txt
      ecore prepare --data empatheticdialogues --out prepared --download
      ecore prepare --data my_corpus --out prepared --vocabulary train --min-count 3
      ecore prepare --data my_corpus --out prepared --intensity vad --intensity-file vad.tsv
    """
    from ecore.data.intensity import SOURCES
    from ecore.data.vocabulary import VOCABULARIES

    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the corpus")
    parser.add_argument("--out", type=Path, required=True, metavar="PREPARED", help="folder to make")
    parser.add_argument("--download", action="store_true", help="fetch EmpatheticDialogues into FOLDER first")
    parser.add_argument(
        "--glove",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="word vectors (.txt, .gz, .zip, .npz); several files stand side by side (default: none)",
    )
    parser.add_argument("--intensity", choices=SOURCES, default="vader", help="source of word intensities")
    parser.add_argument(
        "--intensity-file",
        type=Path,
        metavar="FILE",
        help="the source's word scores; not for vader and none (sentiwordnet: default NLTK's corpus)",
    )
    parser.add_argument(
        "--intensity-floor", type=float, metavar="X", help="least intensity of a word (default: 0.01)"
    )
    parser.add_argument(
        "--vocabulary",
        choices=VOCABULARIES,
        default="literature",
        help="literature: every word of all splits, as in the literature; train: of the training split",
    )
    parser.add_argument(
        "--min-count",
        type=int,
        metavar="N",
        help="vocabulary train: least count of a word (default: 2)",
    )
    parser.add_argument(
        "--relations", type=Path, metavar="FILE", help="commonsense relations (default: none)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="skip and count torn lines, instead of stopping"
    )


def run_prepare(arguments: argparse.Namespace) -> int:
    from ecore.data.corpus import download
    from ecore.data.prepare import prepare
    from ecore.data.statistics import describe
    from ecore.files import expect_new_folder

    if arguments.vocabulary == "literature":
        expect_default(arguments, "goes with --vocabulary train; literature has every word", min_count=None)
    if arguments.intensity == "none":
        expect_default(arguments, "of no use with --intensity none: every word has 1", intensity_floor=None)
    if arguments.download:
        expect_new_folder(arguments.out)  # before megabytes are fetched
        download(arguments.data)
    given = {
        name: getattr(arguments, name)
        for name in ("intensity_floor", "min_count")
        if getattr(arguments, name) is not None
    }
    meta = prepare(
        arguments.data,
        arguments.out,
        glove=arguments.glove,
        intensity=arguments.intensity,
        intensity_file=arguments.intensity_file,
        vocabulary=arguments.vocabulary,
        relations=arguments.relations,
        skip_bad=arguments.skip_bad,
        **given,
    )
    print(describe(meta))
    print(f"next: ecore train --data {arguments.out} --out RUN --preset paper")
    return 0
