"""Compile the Triton kernels ahead of time, for GPUs that need not be present, and report the compiler's figures.

``architectures`` has the limits of GPUs, ``table_entries`` what is compiled, ``compiler`` the compiling, ``report`` the
table. Importing this package imports Triton.
"""

from __future__ import annotations

from ecore_kernels.ahead_of_time.architectures import ARCHITECTURES, occupancy
from ecore_kernels.ahead_of_time.compiler import (
    Compiled,
    compile_all,
    compile_entry,
    compile_launch,
    source_of,
)
from ecore_kernels.ahead_of_time.report import record, table
from ecore_kernels.ahead_of_time.table_entries import Entry, entries, planned

__all__ = [
    "ARCHITECTURES",
    "Compiled",
    "Entry",
    "compile_all",
    "compile_entry",
    "compile_launch",
    "entries",
    "occupancy",
    "planned",
    "record",
    "source_of",
    "table",
]
