"""Settings of a model that trains in a blink."""

from ecore.config import ModelConfig

TINY = ModelConfig(dim=12, thresholds=(0.0, 0.02, 0.05), dropout=0.0, graph_dropout=0.0)
