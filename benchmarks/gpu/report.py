"""The summary of a session, for machines and for people, and the results of its processes in one document."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecore.files import parse_json, read_bytes, read_json

LARGEST_RESULTS = 14 * 2**20


def write_json(path: Path, document: Any) -> None:
    """Write ``document``; a reader finds this file whole, or the one before it."""
    written = path.with_name(path.name + ".part")
    written.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    written.replace(path)


def read(path: Path) -> Any:
    """A result file's content: a JSON document, or of ``.jsonl`` the list of lines; None where there is none yet."""
    if not path.exists():
        return None
    if path.suffix != ".jsonl":
        return read_json(path)
    lines = []
    for number, line_text in enumerate(read_bytes(path).split(b"\n"), 1):
        with contextlib.suppress(ValueError):  # the last one may be torn
            lines.append(parse_json(line_text, f"{path}:{number}"))
    return lines


def collected(sources: Mapping[str, Path]) -> dict[str, Any]:
    """The content of every result file, by name; the largest ones give way where all would be too much."""
    documents: dict[str, Any] = {}
    for name, path in sources.items():
        try:
            content = read(path)
        except (OSError, ValueError) as error:
            content = f"{type(error).__name__}: {error}"
        if content is not None:
            documents[name] = content
    sizes = {name: len(json.dumps(content, indent=1)) for name, content in documents.items()}
    while sum(sizes.values()) > LARGEST_RESULTS:
        largest = max(sizes, key=lambda name: sizes[name])
        documents[largest] = f"left out: {sizes[largest]} bytes"
        sizes[largest] = 0
    return documents


def summary(
    machine: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    sources: Mapping[str, Path],
    seconds: float,
) -> dict[str, Any]:
    """The document of summary.json."""
    failures = [r["step"] for r in records if r["required"] and r["outcome"] != "ok"]
    tests = test_results(read(sources["tests"]) if "tests" in sources else None)
    return {
        "machine": machine,
        "seconds": seconds,
        "failures": failures,
        "tests": tests,
        "steps": list(records),
    }


def line(record: Mapping[str, Any]) -> str:
    """One process in one line; of a failure also its last words."""
    text = f"{record['stage']}: {record['step']}: {record['outcome']}, {record['seconds']} s"
    words = [words for words in record["end_of_output"] if words.strip()]
    if record["required"] and record["outcome"] != "ok" and words:
        text += f": {words[-1].strip()[:200]}"
    return text


def markdown(document: Mapping[str, Any], sources: Mapping[str, Path]) -> str:
    """The text of summary.md: every process, failures with the end of their output, tables."""
    lines = [f"# {document['machine'].get('gpu', 'GPU')}, {document['seconds']:.0f} s", ""]
    lines += [f"- {line(record)}" for record in document["steps"]]
    failures = document["failures"]
    lines.append(f"\nFailed or left out: {', '.join(failures)}" if failures else "\nNothing failed.")
    tests = document["tests"]
    if tests:
        counts = f"{tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed"
        lines.append(f"\nTests: {counts}")
        lines += [f"- {name}: {why}" for name, why in tests["failed"].items()]
    for record in document["steps"]:
        if record["required"] and record["outcome"] != "ok" and record["end_of_output"]:
            heading = f"\n## {record['stage']}: {record['step']}: the end of its output\n"
            lines += [heading, "```", *record["end_of_output"], "```"]
    for name, path in sources.items():
        table = next((table for start, table in TABLES.items() if name.startswith(start)), None)
        if table is not None and path.exists():
            try:
                lines += [f"\n## {name}\n", table(path)]
            except Exception as error:  # the rest does not depend on one table
                lines += [f"{name}: {type(error).__name__}: {error}"]
    return "\n".join(lines) + "\n"


def test_results(outcome_lines: Sequence[Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """Counts, and why tests failed, from the outcomes so far; None where there are none."""
    if not outcome_lines:
        return None
    outcomes: dict[str, Mapping[str, Any]] = {}
    for outcome in outcome_lines:
        if outcomes.get(outcome["test"], {}).get("outcome") != "failed":
            outcomes[outcome["test"]] = outcome
    failed = {name: outcome for name, outcome in outcomes.items() if outcome["outcome"] == "failed"}
    skipped = sum(outcome["outcome"] == "skipped" for outcome in outcomes.values())
    return {
        "passed": len(outcomes) - len(failed) - skipped,
        "skipped": skipped,
        "failed": {name: (o["why"].strip().splitlines() or [""])[-1] for name, o in failed.items()},
    }


# Tables import this checkout's packages only when they are made: without those there are no results to show.


def _smoke(path: Path) -> str:
    rows = read(path)["rows"]
    counts = Counter(row["verdict"] for row in rows)
    lines = [", ".join(f"{count} {verdict}" for verdict, count in counts.items()), ""]
    wrong = [row for row in rows if row["verdict"] not in ("right", "refused")]
    return "\n".join([*lines, *(f"- {json.dumps(row, ensure_ascii=False)}" for row in wrong)])


def _losses(path: Path) -> str:
    from benchmarks import recorded

    return recorded.report(read(path)["results"])


def _steps(path: Path) -> str:
    from benchmarks.training import report

    return report.report(read(path)["results"][0])


def _operators(path: Path) -> str:
    from benchmarks.operators import report

    return report.report(report.load(path))


def _otsu(path: Path) -> str:
    from benchmarks import harness, otsu

    return otsu.report(harness.read_timed_results(path))


def _step_operators(path: Path) -> str:
    from benchmarks import harness, step_operators

    return step_operators.report(harness.read_timed_results(path))


def _sparse(path: Path) -> str:
    from benchmarks import harness, sparse

    return sparse.report(harness.read_timed_results(path))


def _edge_options(path: Path) -> str:
    from benchmarks import edge_options, harness

    return edge_options.report(harness.read_timed_results(path))


def _training(path: Path) -> str:
    lines = read(path)
    if not lines:
        return "no line yet"
    last = lines[-1]
    shown = {name: last[name] for name in ("step", "loss", "seconds_per_step") if name in last}
    validated = [m["valid_ppl_per_sample"] for m in lines if m.get("valid_ppl_per_sample") is not None]
    if validated:
        shown["best valid_ppl_per_sample"] = min(validated)
    return ", ".join(f"{name} {value:.5g}" for name, value in shown.items())


def _evaluation(path: Path) -> str:
    from ecore.evaluation.report import format_run

    return f"```\n{format_run(read(path))}\n```"


def _generate(path: Path) -> str:
    from benchmarks.generation import report, runner

    return report.report(read(path)["results"][0], runner.WORDS_EACH)


TABLES: dict[str, Callable[[Path], str]] = {
    "smoke": _smoke,
    "losses": _losses,
    "steps": _steps,
    "operators": _operators,
    "otsu": _otsu,
    "step_operators": _step_operators,
    "sparse": _sparse,
    "edge_options": _edge_options,
    "train ": _training,
    "evaluation ": _evaluation,
    "generate": _generate,
}
"""The report of a result file, by the start of its name."""
