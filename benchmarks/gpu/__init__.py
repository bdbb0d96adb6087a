"""Everything that a GPU can tell, in stages: ``python -m benchmarks.gpu``."""
