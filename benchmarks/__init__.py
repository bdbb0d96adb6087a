"""Benchmarks of the kernels and of the whole model; each module runs with ``python -m benchmarks.NAME``."""
