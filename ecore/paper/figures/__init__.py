"""The paper's figures from a run, and its training curves: vector and PNG, readable in grey print and by colour-blind
readers. ``draw_run`` writes them all; each has a function that counts what is drawn and one that draws it."""

from ecore.data.emotion_words import cooccurrence
from ecore.paper.figures.aggregation import draw_aggregation
from ecore.paper.figures.correlation import Correlations, draw_correlations, learned_correlation
from ecore.paper.figures.dialogue import Trace, trace
from ecore.paper.figures.drawing import NotDrawn, save
from ecore.paper.figures.run import FIGURES, draw_run
from ecore.paper.figures.secondary import SecondaryShares, draw_secondary, mentions, secondary_shares
from ecore.paper.figures.training import TrainingCurves, draw_training, training_curves
from ecore.paper.figures.word_edges import draw_word_edges

__all__ = [
    "FIGURES",
    "Correlations",
    "NotDrawn",
    "SecondaryShares",
    "Trace",
    "TrainingCurves",
    "cooccurrence",
    "draw_aggregation",
    "draw_correlations",
    "draw_run",
    "draw_secondary",
    "draw_training",
    "draw_word_edges",
    "learned_correlation",
    "mentions",
    "save",
    "secondary_shares",
    "trace",
    "training_curves",
]
