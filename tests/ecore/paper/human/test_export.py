"""A study's systems have to answer the same contexts, and its command says which do not."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ecore.cli.human import declare_human, run_human
from ecore.errors import InputError
from ecore.paper.human.sheets import KINDS
from ecore.paper.human.study import export, score
from tests.ecore.paper.human.raters import fill, record, save, write


def without(*names: str) -> Callable[[dict], dict]:
    return lambda record: {k: v for k, v in record.items() if k not in names}


def test_contexts_are_matched(tmp_path: Path) -> None:
    """By ids, or else by text; the context may stand in any of the files."""
    good = [record("Alpha", i) for i in range(4)]
    a = write(tmp_path / "a.jsonl", [without("context")(r) for r in good])
    b = write(tmp_path / "b.jsonl", [{**r, "turn": "3", "prediction": "b"} for r in good])
    spaced = [{**r, "prediction": "c", "context": [f" {turn} " for turn in r["context"]]} for r in good]
    c = write(tmp_path / "c.jsonl", [without("turn")(r) for r in spaced])
    export({"A": a, "B": b}, tmp_path / "ab", contexts=4, raters=1)
    assert "Yes 2." in (tmp_path / "ab/rater-1/ab-1.csv").read_text(encoding="utf-8-sig")
    export({"B": b, "C": c}, tmp_path / "bc", contexts=4, raters=1)
    with pytest.raises(
        InputError, match=r"c\.jsonl:1: neither 'conv_id' and 'turn' nor 'context' .*a\.jsonl:1"
    ):
        export({"A": a, "C": c}, tmp_path / "ac", contexts=4)
    with pytest.raises(InputError, match=r"a\.jsonl:1: no 'context'"):
        export({"A": a}, tmp_path / "x", contexts=4, kind="rating")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: [r[0], r[1], r[3], r[2]], r"b\.jsonl:5: another conv_id and turn than .*a\.jsonl:3"),
        (lambda r: [*r[:3], {**r[3], "turn": 5}], r"b\.jsonl:6: another conv_id and turn than .*a\.jsonl:4"),
        (
            lambda r: [*r[:3], {**without("conv_id")(r[3]), "context": ["No."]}],
            r"b\.jsonl:6: another context than",
        ),
        (lambda r: r[:3], r"b\.jsonl:5: the last of 3 samples, expected 4"),
        (lambda r: [*r, record("Alpha", 5)], r"a\.jsonl:4: the last of 4 samples, expected 5"),
        (
            lambda r: [{**without("turn")(r[0]), "context": []}, *r[1:]],
            r"b\.jsonl:3: expected 'context' to be a list",
        ),
        (
            lambda r: [{**without("turn")(r[0]), "context": ["a", 1]}, *r[1:]],
            r"b\.jsonl:3: expected 'context'",
        ),
        (lambda r: [without("prediction")(r[0]), *r[1:]], r"b\.jsonl:3: expected 'prediction'"),
    ],
)
def test_other_contexts_are_refused_by_line(tmp_path: Path, change: Callable, message: str) -> None:
    good = [record("Alpha", i) for i in range(4)]
    a, b = write(tmp_path / "a.jsonl", good), write(tmp_path / "b.jsonl", change(good))
    b.write_text("\n\n" + b.read_text())  # blank lines count as lines
    with pytest.raises(InputError, match=message):
        export({"A": a, "B": b}, tmp_path / "out", contexts=2)
    assert not (tmp_path / "out").exists()


def test_export_refuses(files: dict[str, Path], study: Path, tmp_path: Path) -> None:
    one = {"Alpha": files["Alpha"]}
    for systems, options, message in (
        (files, {"contexts": 13}, "at most the 12 of the files, got 13"),
        (files, {"contexts": 0}, "contexts: expected at least 1"),
        (files, {"raters": 0}, "raters: expected at least 1"),
        (files, {"kind": "all"}, "kind: expected rating, ab or both"),
        (one, {}, "both needs two systems"),
        ({**one, "Again": files["Alpha"]}, {"contexts": 3}, "nothing to choose"),
    ):
        with pytest.raises(InputError, match=message):
            export(systems, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"holds a study already"):
        export(files, study, contexts=3)


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    declare_human(parser)
    return run_human(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    systems = [f"{name}={path}" for name, path in files.items()]
    out = tmp_path / "study"
    assert command("export", *systems, "--out", out, "--contexts", 6, "--raters", 2, "--seed", 4) == 0
    assert "raters 2" in capsys.readouterr().out
    sheets = [save(tmp_path / f"{k}-{r}.csv", fill(out, k, r)) for k in KINDS for r in (1, 2)]
    assert command("score", out, *sheets) == 0
    table = capsys.readouterr().out
    result = json.loads((out / "scores.json").read_text())
    assert result == score(out, sheets)
    relevance, pair = result["rating"]["systems"]["Bravo"]["relevance"], result["ab"]["pairs"][1]
    bravo = next(line for line in table.splitlines() if line.startswith("Bravo"))
    assert f"{relevance['mean']:.2f} ± {relevance['sd']:.2f}" in bravo
    charly = [line for line in table.splitlines() if line.startswith("Charly")][1].split()
    outcomes = [f"{pair[outcome]:.1f}" for outcome in ("win", "loss", "tie")]
    assert charly == ["Charly", *outcomes, "12", str(pair["same_answer"]), f"{pair['kappa']:.2f}"]
    assert command("score", out, *sheets[:1], "--out", tmp_path / "s.json") == 0
    assert json.loads((tmp_path / "s.json").read_text())["rating"]["raters"] == [1]
    for kept in (out / "key.json", sheets[0]):
        before = kept.read_bytes()
        with pytest.raises(InputError, match="would overwrite what it is made from"):
            command("score", out, *sheets, "--out", kept)
        assert kept.read_bytes() == before
    with pytest.raises(InputError, match=r"s\.json: exists already"):
        command("export", *systems, "--out", tmp_path / "s.json")


@pytest.mark.parametrize(
    "given, message",
    [
        (["Alpha"], "Alpha: expected SYSTEM=FILE"),
        (["=a.jsonl"], "expected SYSTEM=FILE"),
        (["A="], "expected SYSTEM=FILE"),
        (["A=a.jsonl", "A=b.jsonl"], "A=b.jsonl: the name A is taken already"),
        (["A=none.jsonl", "B=b.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_the_command_refuses(tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command("export", *given, "--out", tmp_path / "study")


def test_a_failed_export_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write(tmp_path / "a.jsonl", [record("Alpha", i) for i in range(4)])
    with monkeypatch.context() as patched:

        def full(path: Path, *arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        patched.setattr("ecore.paper.human.study.write_page", full)
        with pytest.raises(OSError, match="No space left") as error:
            export({"A": a}, tmp_path / "study", contexts=2, kind="rating")
    assert error.value.filename == str(tmp_path / "study/rater-1/rating-1.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    export({"A": a}, tmp_path / "study", contexts=2, kind="rating")
    with pytest.raises(InputError, match="holds a study already"):
        export({"A": a}, tmp_path / "study", contexts=2, kind="rating")
