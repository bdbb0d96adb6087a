"""``ecore figures``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecore.cli.common import expect_default
from ecore.errors import InputError


def declare_figures(parser: argparse.ArgumentParser) -> None:
    """Draw a run's training curves and the paper's Figures 2, 4, 5 and 6, as PDF and PNG with the numbers as JSON.

    training: loss, perplexity, emotion accuracy over steps. 2: share of dialogues that speak of other emotions than
    their label. 4: which emotions go together in the data and in the model. 5: the edges between a dialogue's words and
    the emotions. 6: its emotion features before and after aggregation.

    Figures 5 and 6 are of one dialogue: sample N of a split, counted from 0 as in the predictions file, or turns
    of your own: several --text are the turns of one dialogue, the speaker's first and then alternating. Figures 2
    and 4 count all splits of the data that the run was trained on; where it is gone, the others are drawn.

    examples:
      ecore figures run --out figures
      ecore figures run --out figures --only 5 --only 6 --sample 17
      ecore figures run --out figures --only 5 --text "I was hit by a drunk driver, I am so glad to be alive."
    """
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder made by `ecore train`")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where files go")
    parser.add_argument(
        "--only",
        action="append",
        choices=("training", "2", "4", "5", "6"),
        help="draw this figure; repeat for more (default: all)",
    )
    parser.add_argument("--split", choices=("train", "valid", "test"), help="of --sample (default: test)")
    parser.add_argument("--sample", type=int, metavar="N", help="dialogue of Figures 5 and 6 (default: 0)")
    parser.add_argument(
        "--text", action="append", metavar="TURN", help="one turn of a dialogue of your own; repeat for more"
    )
    parser.add_argument(
        "--data", type=Path, metavar="PREPARED", help="prepared folder (default: the run's own)"
    )


def run_figures(arguments: argparse.Namespace) -> int:
    if arguments.text is not None and (arguments.sample is not None or arguments.split is not None):
        raise InputError("figures: expected either --text or --sample and --split")
    if arguments.only is not None and not {"5", "6"} & set(arguments.only):
        why = f"of Figures 5 and 6 alone, and --only names {', '.join(arguments.only)}"
        expect_default(arguments, why, text=None, sample=None, split=None)
    from ecore.paper.figures import FIGURES, draw_run

    draw_run(
        arguments.folder,
        arguments.out,
        only=arguments.only or FIGURES,
        split=arguments.split or "test",
        sample=arguments.sample or 0,
        text=arguments.text,
        data=arguments.data,
    )
    return 0
