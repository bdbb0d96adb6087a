"""The E-CORE model (Section 3 and Appendices B to D of the paper)."""

from ecore.model.ecore import ECore, ECoreOutput, Encoding, Reply, Scores
from ecore.model.losses import Losses

__all__ = ["ECore", "ECoreOutput", "Encoding", "Losses", "Reply", "Scores"]
