"""E-CORE on a pre-trained GPT-2, such as DialoGPT (Table 6 of the paper); needs ``transformers``."""

from ecore.backbone.files import build, restore
from ecore.backbone.model import BackboneECore

__all__ = ["BackboneECore", "build", "restore"]
