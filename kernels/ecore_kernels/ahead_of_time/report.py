"""Results of compiling as plain data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ecore_kernels.ahead_of_time.compiler import Compiled


def record(compiled: Compiled) -> dict[str, Any]:
    """A result as plain data, for JSON."""
    fields = compiled._asdict()
    del fields["entry"], fields["error"]
    return {
        **compiled.entry._asdict(),
        **fields,
        "warps_per_sm": compiled.blocks * compiled.warps,
        "problem": compiled.problem,
    }


def table(results: Sequence[Compiled]) -> str:
    """Results as aligned text, one line each."""
    head = [
        "kernel", "arithmetic", "d", "depth", "tile", "warps", "stages", "registers", "shared", "spills", "tensor core",
        "blocks/SM", "warps/SM", "limited by",
    ]  # fmt: skip
    lines = [head]
    for r in results:
        name = r.entry.kernel + (f" ({r.entry.variant})" if r.entry.variant else "")
        line = [name, r.entry.arithmetic, str(r.entry.head), str(r.entry.depth)]
        if not r.error:
            tile = " ".join(f"{name}={int(value)}" for name, value in r.constants.items())
            numbers = (
                r.warps,
                r.stages,
                r.registers,
                f"{r.shared:,}",
                r.spills,
                r.tensor_core,
                r.blocks,
                r.blocks * r.warps,
            )
            line += [tile, *map(str, numbers), r.limit]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(head))]
    left = {0, 1, 4, len(head) - 1}
    rows = []
    for line, result in zip(lines, [None, *results], strict=True):
        cells = [
            x.ljust(w) if i in left else x.rjust(w)
            for i, (x, w) in enumerate(zip(line, widths, strict=False))
        ]
        text = "  ".join(cells).rstrip()
        rows.append(text + (f"  ! {result.problem}" if result and result.problem else ""))
    return "\n".join(rows)
