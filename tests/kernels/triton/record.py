"""The record of compiled kernels: ``python -m tests.kernels.triton.record`` compiles what it lacks and writes it.

It also holds the larger configurations that benchmarks.tune tries on new cards.

The compiler's result depends on the kernel's intermediate representation (TTIR), the options, the architecture and the
version of Triton alone, and takes about 300 times as long as the TTIR. The record holds a checksum of the former beside
the latter, so a test run compiles only the kernels that changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from benchmarks.tune import search, trial
from benchmarks.tune.search import Configuration
from ecore_kernels import ahead_of_time
from ecore_kernels.ahead_of_time import Entry

RECORD = Path(__file__).with_name("compiled.json")
TIMES = ("seconds",)  # no property of the kernel


def wanted() -> list[Entry]:
    """Every entry for sm_86, the scarcest architecture, and on the others what only they could refuse."""
    elsewhere = [
        Entry(f"{operator}_{direction}", "half", 100, depth, architecture)
        for operator, depth in (("graph_attention", 1), ("edge_readout", 1), ("edge_attention", 0))
        for direction in ("forward", "backward")
        for architecture in (80, 89, 90)
    ]
    return [*ahead_of_time.entries(86), *elsewhere, Entry("graph_attention_forward", "tf32", 100, 1, 90)]


def digest(entry: Entry) -> str | None:
    """Return the checksum of an entry's TTIR, without line numbers, and of its options; None where there is none."""
    try:
        launched = ahead_of_time.planned(entry)
        backend = make_backend(GPUTarget("cuda", entry.architecture, 32))
        options = backend.parse_options(dict(launched.options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module = ahead_of_time.source_of(launched).make_ir(
            backend.target,
            options,
            backend.get_codegen_implementation(options),
            backend.get_module_map(),
            context,
        )
    except Exception:  # compiling it tells why
        return None
    return hashlib.sha256(f"{sorted(launched.options.items())}\n{module.str_nodebug()}".encode()).hexdigest()[
        :32
    ]


def key(row: dict[str, Any]) -> Entry:
    """Return the entry that a row is of."""
    return Entry(**{name: row[name] for name in Entry._fields})


def version() -> str:
    """Return the version of Triton that the record is of, "" without a record."""
    return json.loads(RECORD.read_text())["triton"] if RECORD.exists() else ""


def recorded() -> dict[Entry, dict[str, Any]]:
    """Return the record's rows; none where it was made by another version of Triton."""
    if version() != triton.__version__:
        return {}
    return {key(row): row for row in json.loads(RECORD.read_text())["kernels"]}


def compiled(entries: Sequence[Entry]) -> tuple[list[dict[str, Any]], list[Entry]]:
    """Return a row for each entry, from the record or else compiled now, and the entries that were compiled."""
    known = recorded()
    # Forked: imports take as long as 25 checksums.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
        digests = dict(zip(entries, pool.map(digest, entries, chunksize=8), strict=True))
    missing = [
        entry
        for entry in entries
        if not digests[entry] or known.get(entry, {}).get("digest") != digests[entry]
    ]
    made = {}
    if missing:
        results = ahead_of_time.compile_all(missing)
        made = {one.entry: ahead_of_time.record(one) | {"digest": digests[one.entry]} for one in results}
    rows = [made.get(entry) or known[entry] for entry in entries]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows], missing


def larger() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row for each of the larger configurations, from the record or else compiled now, and those compiled.

    A row has the kernel, the arithmetic, the configuration, the checksum, the compiler's problem and the spills.
    """
    names = "kernel", "arithmetic", "configuration", "digest"
    whole = json.loads(RECORD.read_text()) if version() == triton.__version__ else {}
    known = {str([row[name] for name in names]): row for row in whole.get("larger", [])}
    rows, made = [], []
    for (kernel, arithmetic), configurations in search.HOPPER.items():
        operator = kernel.rpartition("_")[0]
        entry = Entry(kernel, arithmetic, 100, search.DEPTHS[operator][0], search.HOPPER_ARCHITECTURE)
        for configuration in configurations:
            rows.append(_larger_row(entry, configuration, known))
            if rows[-1] not in known.values():
                made.append(rows[-1])
    return rows, made


def _larger_row(
    entry: Entry, configuration: Configuration, known: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    with trial.using(entry.kernel, configuration):
        checksum = digest(entry)
        row = known.get(str([entry.kernel, entry.arithmetic, configuration, checksum]))
        if checksum and row:
            return row
        result = ahead_of_time.compile_entry(entry)
    found = {"digest": checksum, "problem": result.problem, "spills": result.spills}
    return {"kernel": entry.kernel, "arithmetic": entry.arithmetic, "configuration": configuration, **found}


def main() -> None:
    """Bring the record up to date, or, with a file's name, write rows and what was compiled there instead."""
    if os.environ.pop("TRITON_INTERPRET", None):  # which the kernels have read when they were imported
        os.execv(sys.executable, [sys.executable, "-m", "tests.kernels.triton.record", *sys.argv[1:]])
    rows, missing = compiled(wanted())
    if len(sys.argv) > 1:
        content = {"kernels": rows, "compiled": missing}
        Path(sys.argv[1]).write_text(json.dumps(content))
        return
    larger_rows, made = larger()
    lines, larger_lines = (",\n".join(json.dumps(row) for row in some) for some in (rows, larger_rows))
    content = f'"triton": "{triton.__version__}", "kernels": [\n{lines}\n], "larger": [\n{larger_lines}\n]'
    RECORD.write_text(f"{{{content}}}\n")
    print(f"{RECORD.name}: {len(missing) + len(made)} of {len(rows) + len(larger_rows)} kernels compiled")


if __name__ == "__main__":
    main()
