"""The paper's figures and cases from the runs of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ecore.data.prepared import PreparedData
from ecore.evaluation.predictions import read_predictions
from ecore.files import write_json
from ecore.paper.cases import cases, write_cases
from ecore.paper.experiments.plan import Variant
from ecore.paper.experiments.runs import SCORES
from ecore.paper.published import CASES, FIGURES, HARD, SOFT

PAPERS_CASES = (("hit:1430_conv:2860", 1), ("hit:10320_conv:20641", 1), ("hit:5011_conv:10022", 3))
"""The samples of Tables 5 and 10: EmpatheticDialogues' name of the dialogue, and the turn that is answered."""
_SOFT, _HARD = Variant("soft"), Variant("hard")


def drawn_from(name: str) -> tuple[Variant, ...]:
    """The variants whose first seed a figure or the cases show; none for what shows the data alone, or a table."""
    if name == CASES:
        return _SOFT, _HARD
    return (_SOFT,) if name in FIGURES and name != "figure2" else ()


def draw(name: str, folders: Mapping[Variant, Path], data: PreparedData, out: Path, sample: int) -> None:
    """Write a figure to ``out`` as PDF and PNG, its numbers as JSON; or the cases as Markdown and JSON. Say where.

    Args:
        folders: the run of each of :func:`drawn_from`'s variants.
        sample: the dialogue of Figures 5 and 6: number, from 0, in the test split.

    Raises:
        InputError: it cannot be drawn.
    """
    if name == CASES:
        scored = {name: folders[variant] / SCORES for name, variant in ((SOFT, _SOFT), (HARD, _HARD))}
        _write_cases({name: folder / "predictions.jsonl" for name, folder in scored.items()}, out)
        return
    from ecore.paper.figures import draw_run, draw_secondary, mentions, save, secondary_shares

    if name == "figure2":
        shares = secondary_shares(mentions(data.conversations()))
        write_json(out / f"{name}.json", shares.to_json())
        print(save(draw_secondary(shares), out, name)[0], flush=True)
    else:
        draw_run(folders[_SOFT], out, only=[name.removeprefix("figure")], sample=sample, data=data.folder)


def _write_cases(systems: Mapping[str, Path], out: Path) -> None:
    """The paper's samples where they were scored, and five drawn at random."""
    scored = {(r["conv_id"], r["turn"]) for r in read_predictions(next(iter(systems.values())))}
    known = [key for key in PAPERS_CASES if key in scored]
    chosen = cases(systems, known) if known else []
    shown = {case.conv_id for case in chosen}
    write_cases(out, [*chosen, *(case for case in cases(systems) if case.conv_id not in shown)])
    print(out / "cases.md", flush=True)
