"""The command ``python -m ecore_kernels.verify``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ecore_kernels import backends, info
from ecore_kernels.verify.checks import PRECISIONS, DeviceLostError, checks, make_row
from ecore_kernels.verify.compilers import Compilers
from ecore_kernels.verify.rows import Row


def run(
    device: str,
    each: Callable[[Row], None] = print,
) -> list[Row]:
    """Check every operator on every backend.

    Args:
        device: "cpu" or "cuda".
        each: called with every row as it comes. Refusals of one operator for the same reason are one row.

    Returns:
        The rows.

    Raises:
        DeviceLostError: the GPU is lost; ``each`` has all rows up to there.
    """
    before = torch.get_float32_matmul_precision()
    every = checks(device)
    compilers, rows, refusals = Compilers(every, device), [], set()
    try:
        while every:
            check = every.pop(0)  # its tensors are not kept
            for backend in backends.BACKENDS:
                if backend == "triton":
                    compilers.wait_for(check)
                try:
                    row = make_row(check, backend)
                except DeviceLostError as error:
                    each(error.args[1])
                    raise
                refusal = (row.operator, backend, row.reason)
                if row.verdict == "refused" and refusal in refusals:
                    continue
                refusals.add(refusal)
                rows.append(row)
                each(row)
    finally:
        compilers.close()
        torch.set_float32_matmul_precision(before)
    return rows


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record; the file is never incomplete."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def summary(rows: Sequence[Row], seconds: float) -> str:
    """The rows that are not right, and a line that counts all."""
    bad = [row for row in rows if row.verdict in ("wrong", "failed")]
    counts = [
        (word, sum(row.verdict == word for row in rows)) for word in ("right", "wrong", "failed", "refused")
    ]
    names = ", ".join(dict.fromkeys(row.backend for row in rows if row.verdict != "refused"))
    last = f"{', '.join(f'{count} {word}' for word, count in counts)} in {seconds:.0f} s; backends that ran: {names}"
    return "\n".join([*(["", "Not right:"] if bad else []), *map(str, bad), "", last])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if anything is wrong, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m ecore_kernels.verify",
        description="Check every operator on every backend that runs here, forward and backward, against float64. "
        "Exit code: 0 if all is right, 1 if anything is wrong, 2 for wrong arguments.",
    )
    parser.add_argument(
        "--device", choices=tuple(PRECISIONS), help="where to run (default: cuda where there is a GPU)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there as JSON, as they come")
    arguments = parser.parse_args(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def refuse(why: str) -> None:
        parser.exit(2, f"verify: {why}\n")

    if device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch sees no CUDA device here; python -m ecore_kernels.info says more")
    rows: list[Row] = []
    installation = info.report()

    def keep(finished: bool) -> None:
        if arguments.out is not None:
            entries = [dataclasses.asdict(row) for row in rows]
            record = {"device": device, "installation": installation.splitlines()}
            write(arguments.out, {**record, "finished": finished, "rows": entries})

    try:
        keep(finished=False)
    except OSError as error:
        refuse(f"--out: {error.filename}: {error.strerror}")
    print(f"{installation}\n\n{Row.COLUMNS}", flush=True)
    began = time.perf_counter()

    def each(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)
        keep(finished=False)

    try:
        run(device, each=each)
    except DeviceLostError as error:
        print(summary(rows, time.perf_counter() - began))
        print(f"verify: stopped, for nothing runs on the GPU after this: {error.args[0]}", flush=True)
        return 1
    print(summary(rows, time.perf_counter() - began))
    keep(finished=True)
    return int(any(row.verdict in ("wrong", "failed") for row in rows))
