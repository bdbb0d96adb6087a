"""Random calls of the public operators on every backend, against float64: ``python -m tests.fuzz --help``."""
