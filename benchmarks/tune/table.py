"""The launch table's rows with what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tune.search import OPTIONS, Configuration, Setting


def rewritten(
    rows: Sequence[Mapping[str, Any]], setting: Setting, head: int, architecture: int, found: Configuration
) -> list[dict[str, Any]]:
    """The table's rows with an entry for this setting, head and architecture, in the table's order.

    A lookup takes the nearest depth before the nearest architecture, so a depth that is new to the table would
    change what other architectures get: they are given the entries that they resolved to so far.
    """
    family = {"kernel": setting.kernel, "arithmetic": setting.arithmetic, "head": head}

    def belongs(row: Mapping[str, Any], **more: Any) -> bool:
        return all(row[name] == value for name, value in (family | more).items())

    depths = [row["depth"] for row in rows if belongs(row)]
    copies = []
    if depths and setting.depth not in depths:
        nearest = max((d for d in depths if d <= setting.depth), default=min(depths))
        copies = [dict(row) | {"depth": setting.depth} for row in rows if belongs(row, depth=nearest)]
    entry = {
        **family,
        "depth": setting.depth,
        "architecture": architecture,
        "constants": {name: value for name, value in found.items() if name not in OPTIONS},
        **{name: found[name] for name in OPTIONS},
    }
    kept = [dict(row) for row in (*rows, *copies)]
    kept = [r for r in kept if not belongs(r, depth=setting.depth, architecture=architecture)]
    kernels = list(dict.fromkeys(row["kernel"] for row in (*rows, entry)))
    kinds = list(dict.fromkeys(row["arithmetic"] for row in (*rows, entry)))

    def place(row: Mapping[str, Any]) -> tuple[int, ...]:
        where = kernels.index(row["kernel"]), kinds.index(row["arithmetic"])
        return (*where, row["head"], row["depth"], row["architecture"])

    return sorted([*kept, entry], key=place)


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as its file has it: one line an entry."""
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n"
