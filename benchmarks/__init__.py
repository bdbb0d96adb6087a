"""Benchmarks of the kernels and of the whole model; each module runs with ``python -m benchmarks.NAME``."""

import os

# The profiler, which counts launches and memory, would announce itself on stderr; it reads this as torch is
# imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
