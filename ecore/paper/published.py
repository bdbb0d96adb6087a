"""The numbers that the paper prints, by its own table numbers, row names and columns.

The names of rows under a strategy's heading begin with the strategy: "Ours(Soft) w/o graph". ``None`` means that the
paper prints a dash or nothing; ``spread`` has a table's dispersion ("33.04±0.22"), column by column.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PPL, DIST_1, DIST_2, ACC = "PPL", "Dist-1", "Dist-2", "Acc"
AUTOMATIC = (PPL, DIST_1, DIST_2, ACC)
HUMAN = ("Fluency", "Relevance", "Empathy")
RECALL = ("R@1", "R@3", "R@5", "R@relevant")
LOWER_IS_BETTER = frozenset({PPL})

STEPS = 26_000
"""Iterations of the paper's training (Appendix D)."""
SEEDS = 5
"""Random seeds behind Table 7 (Appendix F)."""
P_SOFT_OVER_CEM = 5.68e-5
"""One-sided Student's t-test of Appendix G."""

SOFT, HARD, TRANSFORMER = "Ours(Soft)", "Ours(Hard)", "Transformer"
MULTITASK = "Transformer, multi-task"
"""A row that the paper lacks: its Transformer predicts no emotion."""

Values = tuple[float | None, ...]


@dataclass(frozen=True)
class PaperTable:
    """One table: each row's values are in the order of ``columns``."""

    number: int
    title: str
    columns: tuple[str, ...]
    rows: dict[str, Values]
    spread: dict[str, Values] = field(default_factory=dict)


_SOFT: Values = (33.04, 0.68, 3.38, 42.57)
_HARD: Values = (33.03, 0.72, 3.49, 42.59)

TABLE_1 = PaperTable(
    1,
    "Comparisons with SOTAs",
    (*AUTOMATIC, *HUMAN),
    {
        TRANSFORMER: (37.73, 0.47, 2.04, None, 3.76, 3.32, 3.14),
        "MIME": (37.09, 0.47, 1.91, 34.24, 3.82, 3.64, 3.35),
        "EmpDG": (37.29, 0.46, 2.02, 34.31, 3.79, 3.67, 3.46),
        "SEEK": (37.37, 0.70, 3.13, 38.90, 3.86, 3.78, 3.54),
        "KEMP": (36.89, 0.55, 2.29, 39.31, 3.88, 3.86, 3.62),
        "CEM": (36.11, 0.66, 2.99, 39.11, 3.92, 3.77, 3.60),
        SOFT: (*_SOFT, 3.94, 3.96, 4.02),
        HARD: (*_HARD, 3.92, 4.00, 4.08),
    },
)

TABLE_3 = PaperTable(
    3,
    "Comparisons with SOTAs on the sub-dataset",
    (*AUTOMATIC, *RECALL),
    {
        "MIME": (35.18, 1.25, 3.27, 33.05, 0.51, 0.79, 1.03, None),
        "EmpDG": (35.27, 1.23, 3.20, 33.17, 0.52, 0.84, 1.07, None),
        "SEEK": (35.14, 1.78, 6.54, 34.22, 0.51, 0.88, 1.12, None),
        "KEMP": (34.56, 1.39, 4.27, 36.37, 0.58, 1.02, 1.32, None),
        "CEM": (34.52, 1.64, 5.37, 36.26, 0.57, 0.98, 1.24, None),
        SOFT: (31.12, 2.36, 9.57, 39.41, 0.65, 1.47, 1.92, None),
        # The paper prints one recall, of the relevant set, across the last columns.
        HARD: (31.18, 2.11, 8.62, 40.46, None, None, None, 1.47),
    },
)

TABLE_4 = PaperTable(
    4,
    "Results on ablation studies",
    AUTOMATIC,
    {
        SOFT: _SOFT,
        f"{SOFT} w/o graph": (36.42, 0.51, 2.30, 40.36),
        f"{SOFT} w/o co-p": (35.92, 0.53, 2.38, 39.26),
        f"{SOFT} w/o co-loss": (35.36, 0.56, 2.71, 38.15),
        HARD: _HARD,
        f"{HARD} w/o graph": (36.44, 0.52, 2.98, 39.83),
        f"{HARD} w/o co-p": (35.71, 0.51, 2.55, 39.92),
        f"{HARD} w/o co-loss": (35.50, 0.50, 2.36, 38.19),
        f"{HARD} w/o co-g": (35.45, 0.54, 2.70, 42.00),
    },
)

TABLE_6 = PaperTable(
    6,
    "Comparisons results based on pre-trained language model",
    AUTOMATIC,
    {
        "KEMP-DialoGPT": (15.21, 2.79, 4.24, 46.43),
        "CEM-DialoGPT": (15.06, 2.88, 4.52, 46.20),
        f"{SOFT}-DialoGPT": (13.02, 2.96, 4.91, 50.04),
        f"{HARD}-DialoGPT": (12.94, 3.07, 4.96, 50.12),
    },
)

TABLE_7 = PaperTable(
    7,
    "Results of variance on all evaluation metrics",
    AUTOMATIC,
    {SOFT: _SOFT, HARD: _HARD},
    spread={SOFT: (0.22, 0.01, 0.02, 0.13), HARD: (0.24, 0.02, 0.04, 0.09)},
)

TABLE_8 = PaperTable(
    8,
    "More results on ablation study",
    AUTOMATIC,
    {
        SOFT: _SOFT,
        f"{SOFT} w/o gate-g": (35.11, 0.58, 3.01, 42.02),
        f"{SOFT} w/o gen-loss": (34.40, 0.61, 2.73, 39.37),
        HARD: _HARD,
        f"{HARD} w/o gate-g": (35.32, 0.56, 3.07, 42.13),
        f"{HARD} w/o gen-loss": (34.74, 0.57, 2.50, 39.83),
    },
)

TABLE_9 = PaperTable(
    9,
    "More ablation studies on the performance of emotion intensity",
    AUTOMATIC,
    {
        f"{SOFT}-SKEP": _SOFT,
        f"{SOFT}-VAD": (33.39, 0.66, 3.36, 42.28),
        f"{SOFT}-VADER": (33.35, 0.65, 3.32, 42.17),
        f"{SOFT}-SentiWordNet": (33.46, 0.63, 3.34, 42.05),
        f"{SOFT} w/o": (34.97, 0.54, 3.02, 40.06),
        f"{HARD}-SKEP": _HARD,
        f"{HARD}-VAD": (33.35, 0.68, 3.44, 42.35),
        f"{HARD}-VADER": (33.32, 0.66, 3.42, 42.07),
        f"{HARD}-SentiWordNet": (33.42, 0.65, 3.38, 42.02),
        f"{HARD} w/o": (34.91, 0.57, 3.06, 40.12),
    },
)

TABLES = {f"table{t.number}": t for t in (TABLE_1, TABLE_3, TABLE_4, TABLE_6, TABLE_7, TABLE_8, TABLE_9)}
"""By the names that ``ecore reproduce`` takes. Tables 2, 5, 10, 11 and 12 hold no measurement of a run."""
FIGURES = ("figure2", "figure4", "figure5", "figure6")
CASES = "cases"
EXPERIMENTS = (*TABLES, *FIGURES, CASES)
"""Tables and figures that `ecore reproduce` makes."""
APPENDIX_H = {
    "conversations": 2547,
    "several": 1536,
    "screened": 1097,
    "reviewed": 739,
    "labels_per_sample": 2.93,
}
"""Annotation by ChatGPT and ChatLLaMa of EmpatheticDialogues' test split; the last two are after review."""
