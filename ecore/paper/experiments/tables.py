"""The paper's tables with our results added: as data, and as Markdown to read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ecore.paper.experiments.plan import Run, Variant, comparisons
from ecore.paper.experiments.significance import outperforms
from ecore.paper.published import AUTOMATIC, LOWER_IS_BETTER, PPL, RECALL, TABLE_1, TABLES, PaperTable

Measured = dict[str, float | None]
"""One run's value in each column of a table; None where it has none."""
METRIC_OF = {PPL: "ppl_per_sample", "Dist-1": "dist_1", "Dist-2": "dist_2", "Acc": "accuracy"}
"""Name of a column in ``metrics.json``."""
COST = ("Parameters, M", "Steps/s")
"""Columns of ours alone, where Table 1's other systems are trained."""
NOTHING = "–"


def measured(metrics: Mapping[str, Any]) -> Measured:
    """The automatic columns from what ``metrics.json`` holds."""
    return {column: metrics.get(name) for column, name in METRIC_OF.items()}


def build(
    table: str,
    rows: Mapping[str, Variant | str],
    runs: Sequence[Run],
    measure: Callable[[Run], Measured | None],
    failures: Mapping[str, str],
    further_columns: Sequence[str] = (),
) -> dict[str, Any]:
    """A table as data: every row of the paper, our row for it, their difference, and the t-tests.

    Args:
        rows: what each row of ours was trained as, or why it was not (:func:`ecore.paper.experiments.plan.rows_of`).
        measure: a run's values, or None while it is not done.
        failures: why runs failed, by name.
        further_columns: of ours, which the paper does not have.
    """
    paper = TABLES[table]
    lines, values = [], {}
    for name in _in_order(paper, rows):
        row: dict[str, Any] = {"name": name, "paper": _paper_values(paper, name)}
        if name in paper.spread:
            row["paper_std"] = dict(zip(paper.columns, paper.spread[name], strict=True))
        if name in rows:
            variant = rows[name]
            values[name], ours = _ours(variant, runs, measure, failures)
            row["rival"] = isinstance(variant, Variant) and variant.model != "ecore"
            row |= ours
            row["difference"] = {
                column: cell["mean"] - row["paper"][column]
                for column, cell in ours["ours"].items()
                if row["paper"].get(column) is not None
            }
        else:
            row["quoted"] = True
        lines.append(row)
    return {
        "table": table,
        "title": f"Table {paper.number}: {paper.title}",
        "columns": [*paper.columns, *further_columns],
        "lower_is_better": sorted(LOWER_IS_BETTER),
        "rows": lines,
        "tests": [_test(paper, a, b, values) for a, b in comparisons(table, [row["name"] for row in lines])],
    }


def _in_order(paper: PaperTable, rows: Iterable[str]) -> list[str]:
    """Return all rows' names: the paper's in its order, each before its variants ("MIME, at our size")."""
    names: list[str] = []
    for name in paper.rows:
        names += [
            name,
            *(other for other in rows if other.startswith(f"{name}, ") and other not in paper.rows),
        ]
    return [*names, *(name for name in rows if name not in names)]


def _paper_values(paper: PaperTable, name: str) -> dict[str, float | None]:
    if name not in paper.rows:
        return {}
    return dict(zip(paper.columns, paper.rows[name], strict=True))


def _ours(
    variant: Variant | str,
    runs: Sequence[Run],
    measure: Callable[[Run], Measured | None],
    failures: Mapping[str, str],
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Each column's values over the seeds that are done, and the row's part of the table."""
    if isinstance(variant, str):
        return {}, {"ours": {}, "seeds": [], "runs": [], "notes": [f"not trained: {variant}"]}
    done: list[Any] = []
    columns: dict[str, list[float]] = {}
    missing: dict[str, list[str]] = {}
    for run in runs:
        if run.variant != variant:
            continue
        results = measure(run)
        if results is None:
            why = f"failed: {failures[run.name]}" if run.name in failures else "not done"
            missing.setdefault(why, []).append(run.name)
            continue
        done.append(run)
        for column, value in results.items():
            if value is not None:
                columns.setdefault(column, []).append(value)
    return columns, {
        "ours": {column: {**_spread(values), "values": values} for column, values in columns.items()},
        "seeds": [run.seed for run in done],
        "runs": [run.name for run in done],
        "notes": [f"{', '.join(names)} {why}" for why, names in missing.items()],
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; a single value has none."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _test(
    paper: PaperTable, a: str, b: str, values: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, Any]:
    """Compare ``a`` with ``b``, column by column: the paper's gain, ours, and its p.

    A gain is positive where ``a`` is better. ``b`` may be a row that is only quoted.
    """
    quoted = b not in values
    theirs = {n: _paper_values(paper, n) or _paper_values(TABLE_1, n) for n in (a, b)}
    columns = {}
    for column in paper.columns:
        if column not in (*AUTOMATIC, *RECALL):
            continue
        sign = -1.0 if column in LOWER_IS_BETTER else 1.0
        cell: dict[str, Any] = {"paper": None, "ours": None, "p": None}
        first, second = (theirs[n].get(column) for n in (a, b))
        if first is not None and second is not None:
            cell["paper"] = sign * (first - second)
        ours = values.get(a, {}).get(column)
        others = second if quoted else values[b].get(column)
        if ours and others is not None:
            other = others if isinstance(others, float) else statistics.fmean(others)
            cell["ours"] = sign * (statistics.fmean(ours) - other)
            p = outperforms(ours, others, column in LOWER_IS_BETTER)
            cell |= {"why_no_p": p} if isinstance(p, str) else {"p": p}
        columns[column] = cell
    return {"a": a, "b": b, "b_is_quoted": quoted, "columns": columns}


def markdown(table: Mapping[str, Any], notes: Sequence[str]) -> str:
    """:func:`build`'s table to read: up to three lines a row, then the tests, then ``notes``."""
    columns = table["columns"]
    heads = [f"{column} ↓" if column in table["lower_is_better"] else column for column in columns]
    lines = [f"# {table['title']}", "", *_head("model", "", *heads)]
    remarks = []
    for row in table["rows"]:
        paper, std = row["paper"], row.get("paper_std", {})
        if paper:
            cells = [_number(paper.get(c), std.get(c)) for c in columns]
            lines.append(_line(row["name"], "quoted" if row.get("quoted") else "paper", *cells))
        whose = "trained here" if row.get("rival") else "ours"
        if "ours" in row:
            cells = [_number(**_mean_and_std(row["ours"].get(c))) for c in columns]
            trained = counted(len(row["seeds"]), "seed") if row["seeds"] else _state(row["notes"])
            lines.append(_line("" if paper else row["name"], f"**{whose}**, {trained}", *cells))
        if row.get("difference"):
            cells = [_difference(row["difference"].get(c), c in table["lower_is_better"]) for c in columns]
            lines.append(_line("", f"{whose} − paper", *cells))
        remarks += [f"{row['name']}: {note}." for note in row.get("notes", ())]
    lines += [""]
    tests, reasons = _tests(table)
    lines += [*tests, *(f"- {note}" for note in (*remarks, *reasons, *notes))]
    return "\n".join(lines) + "\n"


def _tests(table: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The tests' lines, and a note for every reason why a p is missing."""
    shown = [t for t in table["tests"] if any(cell["ours"] is not None for cell in t["columns"].values())]
    if not shown:
        return [], []
    columns = list(shown[0]["columns"])
    legend = "A gain is positive where A is better; p under 0.05 is bold."
    lines = ["## Is it better?", "", legend, "", *_head("A over B", "", *columns)]
    reasons = set()
    for test in shown:
        cells = test["columns"].values()
        second = f"{test['b']} (quoted)" if test["b_is_quoted"] else test["b"]
        lines += [
            _line(f"{test['a']} over {second}", "gain in the paper", *(_signed(c["paper"]) for c in cells)),
            _line("", "**our gain**", *(_signed(c["ours"]) for c in cells)),
            _line("", "p, one-sided", *(_p(c["p"]) for c in cells)),
        ]
        reasons |= {cell["why_no_p"] for cell in cells if "why_no_p" in cell}
    return [*lines, ""], [f"No p: {reason}." for reason in sorted(reasons)]


def _head(*cells: str) -> tuple[str, str]:
    return _line(*cells), _line("---", "---", *("---:" for _ in cells[2:]))


def _line(*cells: str) -> str:
    # A bar within a cell would end it.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _mean_and_std(cell: Mapping[str, Any] | None) -> dict[str, float | None]:
    return {"value": None, "std": None} if cell is None else {"value": cell["mean"], "std": cell["std"]}


def _number(value: float | None, std: float | None = None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.2f}" if std is None else f"{value:,.2f} ± {std:,.2f}"


def _signed(value: float | None) -> str:
    """With its sign; what rounds to 0 has none."""
    if value is None:
        return NOTHING
    return f"{value:+,.2f}" if f"{value:.2f}" not in ("0.00", "-0.00") else "0.00"


def _difference(value: float | None, lower_is_better: bool) -> str:
    text = _signed(value)
    if value is None or text == "0.00":
        return text
    return f"{text} {'better' if (value < 0) == lower_is_better else 'worse'}"


def _p(value: float | None) -> str:
    """Bold where it is under 0.05."""
    if value is None:
        return NOTHING
    text = f"{value:.2e}" if value < 0.001 else f"{value:.3f}"
    return f"**{text}**" if value < 0.05 else text


def _state(notes: Sequence[str]) -> str:
    """Return the reason for an empty row, in two words; the notes below the table give it in full."""
    for state in ("not trained", "failed"):
        if any(state in note for note in notes):
            return state
    return "not done"


def counted(number: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {what}" + ("" if number == 1 else "s")
