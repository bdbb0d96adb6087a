"""``ecore human``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecore.errors import InputError

KINDS = ("rating", "ab", "both")


def declare_human(parser: argparse.ArgumentParser) -> None:
    """Human evaluation: sheets for raters out of predictions files, and the scores of finished sheets.

    Raters see contexts and responses, and never which system said what: that is in FOLDER/key.json, which stays with
    you. Each gets a folder with a page to open in a browser, and the same as a CSV sheet for spreadsheet programs.

    examples:
      ecore human export Soft=soft.jsonl Hard=hard.jsonl Transformer=transformer.jsonl --out study
      ecore human export Soft=soft.jsonl --out study --kind rating --contexts 50 --raters 2
      ecore human score study rating-1.csv rating-2.csv rating-3.csv ab-1.csv ab-2.csv ab-3.csv
    """
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    export = actions.add_parser(
        "export", help="draw contexts and write the raters' sheets", formatter_class=parser.formatter_class
    )
    export.add_argument(
        "systems",
        nargs="+",
        metavar="SYSTEM=FILE",
        help="a system's name and its predictions, the same contexts line by line in every file; A/B choice is "
        "between the first system and each other",
    )
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the new study")
    export.add_argument("--contexts", type=int, default=100, metavar="N", help="contexts to draw")
    export.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the draw and of every order"
    )
    export.add_argument("--raters", type=int, default=3, metavar="N", help="how many people rate")
    export.add_argument(
        "--kind",
        choices=KINDS,
        default="both",
        help="rating: fluency, relevance and empathy from 1 to 5; ab: which of two responses is better",
    )

    score = actions.add_parser(
        "score", help="read finished sheets and count", formatter_class=parser.formatter_class
    )
    score.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the study, as made by `ecore human export`"
    )
    score.add_argument(
        "sheets", type=Path, nargs="+", metavar="SHEET.csv", help="the raters' finished sheets"
    )
    score.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default: FOLDER/scores.json)")


def run_human(arguments: argparse.Namespace) -> int:
    return _export(arguments) if arguments.action == "export" else _score(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from ecore.paper.human.key import KEY
    from ecore.paper.human.study import export

    systems: dict[str, Path] = {}
    for given in arguments.systems:
        name, equals, file = given.partition("=")
        if not (name.strip() and equals and file):
            raise InputError(f"{given}: expected SYSTEM=FILE, as in Soft=soft.jsonl")
        if name.strip() in systems:
            raise InputError(f"{given}: the name {name.strip()} is taken already, expected another")
        systems[name.strip()] = Path(file)
    out = arguments.out
    key = export(systems, out, arguments.contexts, arguments.raters, arguments.kind, arguments.seed)
    print(f"contexts {len(key['contexts']):,}, systems {len(systems)}, raters {arguments.raters}")
    for name, sheet in key["sheets"].items():
        print(f"  {out}/rater-{sheet['rater']}/{name}.html and .csv: {len(sheet['items']):,} items")
    print(f"each rater gets one folder; {out / KEY} tells who said what and stays with you")
    print(f"next: ecore human score {out} SHEET.csv ...")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from ecore.files import expect_apart, expect_file, write_json
    from ecore.paper.human.key import KEY
    from ecore.paper.human.study import format_scores, score

    out = arguments.out or arguments.folder / "scores.json"
    expect_apart(out, (arguments.folder / KEY, *arguments.sheets))
    expect_file(out)
    result = score(arguments.folder, arguments.sheets)
    write_json(out, result)
    print(format_scores(result), f"\nscores: {out}", sep="\n")
    return 0
