"""A model behind HTTP: requests (``protocol``), batched as they come (``batcher``), answered (``app``), ``server``."""
