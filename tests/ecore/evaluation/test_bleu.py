"""BLEU-4 against its formula, and reports where sacrebleu is missing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from ecore import cli
from ecore.evaluation.bleu import bleu_4

PREDICTIONS = ["i am so sorry to hear that .", "that is great !", "what did he do ?"]
REFERENCES = ["i am sorry to hear that .", "that is so great !", "why did he do that to you ?"]


def test_bleu_4_by_its_formula() -> None:
    """Clipped matches over n-grams, of all responses together; the geometric mean; the brevity penalty."""
    pytest.importorskip("sacrebleu")
    result = bleu_4(*([text.split() for text in texts] for texts in (PREDICTIONS, REFERENCES)))
    # 1: 7 + 4 + 4 of 8 + 4 + 5; 2: i-am, sorry-to to-hear hear-that that-. | that-is great-! | did-he he-do;
    # 3: sorry-to-hear to-hear-that hear-that-. | did-he-do; 4: sorry-to-hear-that to-hear-that-.
    shares = [15 / 17, 9 / 14, 4 / 11, 2 / 8]
    brevity = math.exp(1.0 - (7 + 5 + 8) / 17)
    expected = 100.0 * brevity * math.exp(sum(map(math.log, shares)) / 4)
    assert result["bleu_4"] == pytest.approx(expected, rel=1e-9)
    assert "tok:none" in result["bleu_signature"]


def test_words_are_not_split_anew() -> None:
    pytest.importorskip("sacrebleu")
    same = [["e.g.", "it's", "o'clock", "now"]]
    assert bleu_4(same, same)["bleu_4"] == pytest.approx(100.0)
    assert bleu_4(same, [["e.g", ".", "it", "'s", "o'clock", "now"]])["bleu_4"] < 30.0


def test_a_report_without_sacrebleu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    lines = [{"prediction": a, "reference": b} for a, b in zip(PREDICTIONS, REFERENCES, strict=True)]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    assert cli.main(["evaluate", "--predictions", str(path)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("BLEU-4"))
    assert row.split()[1] == "-"
    assert row.endswith("needs the package sacrebleu: pip install 'ecore[experiments]'")
