"""EmpatheticDialogues, where ECORE_DATA names the data folder: its numbers, and the counting models on it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.evaluation import yardsticks
from ecore.files import read_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ed_prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("ECORE_DATA"):
        pytest.skip("ECORE_DATA does not name the folder of EmpatheticDialogues")
    folder, out = Path(os.environ["ECORE_DATA"]), tmp_path_factory.mktemp("ed") / "prepared"
    begin = time.perf_counter()
    prepare(
        folder / "ed",
        out,
        glove=[folder / "glove" / "glove_6B_100d_ed.npz"],
        relations=folder / "knowledge" / "ed_word_relations.tsv.gz",
        progress=False,
    )
    print(f"prepared in {time.perf_counter() - begin:.1f} s")
    return out


def test_real_data(ed_prepared: Path) -> None:
    """The numbers that the design measured, within what another tokenizer's conventions may move."""
    data = PreparedData.load(ed_prepared)
    meta = read_json(ed_prepared / "meta.json")
    assert [len(split) for split in (data.train, data.valid, data.test)] == [40254, 5738, 5259]
    assert 23_000 < meta["vocabulary_size"] < 24_700
    assert sum(split["truncated_contexts"] for split in meta["splits"].values()) == 0
    splits = (data.train, data.valid, data.test)
    contexts = np.concatenate([split.context_lengths - 1 for split in splits])
    responses = np.concatenate([split.response_lengths - 1 for split in splits])
    for lengths, mean, p90, highest in ((contexts, 36, 66, 363), (responses, 14, 24, 113)):
        assert lengths.mean() == pytest.approx(mean, rel=0.03)
        assert np.percentile(lengths, 90) == pytest.approx(p90, rel=0.05)
        assert lengths.max() == pytest.approx(highest, rel=0.03)
    assert meta["zero_intensity"] == pytest.approx(0.91, abs=0.01)
    shares = meta["intensity_shares"]
    assert shares["0.075"]["literal"]["contexts"] == pytest.approx(0.56, abs=0.03)
    assert shares["0.15"]["literal"]["contexts"] == pytest.approx(0.15, abs=0.03)
    assert shares["0.075"]["matched"]["words"] <= 0.10
    assert shares["0.15"]["matched"]["words"] <= 0.03
    assert meta["glove_coverage"]["tokens"] > 0.97


def test_empathetic_dialogues(ed_prepared: Path) -> None:
    """The figures of the design: absolute discounting gives its 71 and 57, naive Bayes its 40.3 and 36.8."""
    data = PreparedData.load(ed_prepared)
    valid = yardsticks.yardsticks(data.train, data.valid, data.vocabulary)
    assert valid["bigram"] == pytest.approx(71, abs=0.5)
    assert valid["trigram"] == pytest.approx(57, abs=0.5)
    assert valid["unigram"] == pytest.approx(275, abs=2)
    assert valid["naive_bayes_accuracy"] == pytest.approx(40.3, abs=0.5)
    test = yardsticks.yardsticks(data.train, data.test, data.vocabulary)
    assert test["naive_bayes_accuracy"] == pytest.approx(36.8, abs=0.5)
