"""The E-CORE model (Section 3 and Appendices B to D of the paper)."""

from ecore.model.ecore import ECore
from ecore.model.losses import Losses
from ecore.model.outputs import ECoreOutput, Encoding, Scores

__all__ = ["ECore", "ECoreOutput", "Encoding", "Losses", "Scores"]
