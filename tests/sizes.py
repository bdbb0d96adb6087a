"""The size of the model that tests train through the command line."""

TINY_MODEL = ("--preset", "tiny", "--dim", "12", "--feed-forward", "16")
"""Options of ``ecore train`` and ``ecore reproduce``: a model that trains in a blink."""
