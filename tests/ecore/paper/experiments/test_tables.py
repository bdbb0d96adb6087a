"""The tables: their arithmetic by hand, their tests of significance, and what they say of missing runs."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from ecore.config import PRESETS
from ecore.errors import InputError
from ecore.paper.experiments import plan, reproduce, tables
from ecore.paper.experiments.plan import Run, Settings, Variant
from ecore.paper.experiments.significance import outperforms
from ecore.paper.published import HARD, SOFT
from tests.ecore.paper.experiments.made_up import NOTHING, fake_runs

stats = pytest.importorskip("scipy.stats")


def test_trained_rivals_stand_below_the_quoted(tmp_path):
    rows = {
        name: variant
        for name, variant in plan.rows_of("table1", replace(NOTHING, baselines=True)).items()
        if isinstance(variant, Variant)
    }
    planned = [run for variant in rows.values() for run in fake_runs(variant, 1)]
    cost = dict(zip(tables.COST, (7.5, 20.0), strict=True))
    table = tables.build(
        "table1",
        rows,
        planned,
        lambda run: {"PPL": 36.0, "Acc": 35.0, **cost},
        {},
        further_columns=tables.COST,
    )
    names = [row["name"] for row in table["rows"]]
    assert names[:5] == [
        *("Transformer", "Transformer, multi-task", "Transformer, multi-task, at our size"),
        *("MIME", "MIME, at our size"),
    ]
    lines = tables.markdown(table, []).splitlines()
    row = lines.index("| MIME | paper | 37.09 | 0.47 | 1.91 | 34.24 | 3.82 | 3.64 | 3.35 | – | – |")
    assert (
        lines[row + 1] == "|  | **trained here**, 1 seed | 36.00 | – | – | 35.00 | – | – | – | 7.50 | 20.00 |"
    )
    assert lines[row + 3].startswith("| MIME, at our size | **trained here**, 1 seed | 36.00 |")
    assert "| SEEK | quoted |" in "\n".join(lines)


def table4(values, failures=None):
    """Table 4 with soft and without graph only, from each seed's perplexity and accuracy (None: not done)."""
    rows = {SOFT: Variant("soft"), f"{SOFT} w/o graph": Variant("soft", ("graph",))}
    planned = [run for name, variant in rows.items() for run in fake_runs(variant, len(values[name]))]

    def measure(run):
        name = SOFT if run.variant == Variant("soft") else f"{SOFT} w/o graph"
        found = values[name][run.seed]
        return found and {"PPL": found[0], "Dist-1": 0.5, "Dist-2": 3.0, "Acc": found[1]}

    return tables.build("table4", rows, planned, measure, failures or {})


def test_means_deviations_and_differences_by_hand():
    table = table4({SOFT: [(30.0, 40.0), (34.0, 43.0)], f"{SOFT} w/o graph": [(35.0, None), (39.0, None)]})
    soft, without = table["rows"][:2]
    assert soft["ours"]["PPL"] == {"mean": 32.0, "std": pytest.approx(math.sqrt(8)), "values": [30.0, 34.0]}
    assert soft["difference"]["PPL"] == pytest.approx(32.0 - 33.04)
    assert soft["difference"]["Acc"] == pytest.approx(41.5 - 42.57)
    assert "Acc" not in without["ours"]
    assert soft["seeds"] == [0, 1]
    assert not any("quoted" in row for row in table["rows"][:2])
    test = table["tests"][0]
    assert (test["a"], test["b"]) == (SOFT, f"{SOFT} w/o graph")
    assert test["columns"]["PPL"]["ours"] == pytest.approx(5.0)  # lower by 5 is better by 5
    assert test["columns"]["PPL"]["paper"] == pytest.approx(36.42 - 33.04)
    assert test["columns"]["Acc"]["paper"] == pytest.approx(42.57 - 40.36)
    # t = 5 / sqrt(8 · (1/2 + 1/2)) with 2 degrees of freedom, whose distribution has a closed form.
    t = 5 / math.sqrt(8)
    assert test["columns"]["PPL"]["p"] == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))
    assert test["columns"]["Acc"] == {"paper": pytest.approx(2.21), "ours": None, "p": None}
    assert test["columns"]["Dist-1"]["why_no_p"] == "the seeds do not differ"

    text = tables.markdown(table, ["a note"])
    lines = text.splitlines()
    row = lines.index("| Ours(Soft) | paper | 33.04 | 0.68 | 3.38 | 42.57 |")
    assert (
        lines[row + 1] == "|  | **ours**, 2 seeds | 32.00 ± 2.83 | 0.50 ± 0.00 | 3.00 ± 0.00 | 41.50 ± 2.12 |"
    )
    assert lines[row + 2] == "|  | ours − paper | -1.04 better | -0.18 worse | -0.38 worse | -1.07 worse |"
    assert "| Ours(Hard) | quoted |" in text  # not asked for here
    assert "- a note" in lines
    json.dumps(table)


def test_one_seed_has_no_test_and_no_deviation():
    table = table4({SOFT: [(30.0, 40.0)], f"{SOFT} w/o graph": [(35.0, 39.0)]})
    assert table["rows"][0]["ours"]["PPL"]["std"] is None
    assert table["tests"][0]["columns"]["PPL"]["p"] is None
    text = tables.markdown(table, [])
    assert "| **ours**, 1 seed | 30.00 | 0.50 | 3.00 | 40.00 |" in text
    assert "No p: needs at least two seeds." in text


def test_rows_show_what_failed_and_what_is_not_done():
    table = table4(
        {SOFT: [(30.0, 40.0), None], f"{SOFT} w/o graph": [None, None]},
        {"soft-without-graph-seed0": "no memory", "soft-without-graph-seed1": "no memory"},
    )
    text = tables.markdown(table, [])
    assert "| **ours**, 1 seed | 30.00 |" in text
    assert "- Ours(Soft): soft-seed1 not done." in text
    assert "| **ours**, failed | – | – | – | – |" in text
    failed = "soft-without-graph-seed0, soft-without-graph-seed1 failed: no memory"
    assert f"- Ours(Soft) w/o graph: {failed}." in text


def test_a_quoted_row_is_tested_as_one_number():
    rows = {SOFT: Variant("soft"), HARD: "needs something"}
    measure = {0: 35.0, 1: 34.0, 2: 34.5}
    table = tables.build(
        "table7",
        rows,
        fake_runs(Variant("soft"), 3),
        lambda run: {"PPL": measure[run.seed], "Acc": None},
        {},
    )
    test = table["tests"][0]
    assert test["b_is_quoted"]
    assert test["columns"]["PPL"]["ours"] == pytest.approx(36.11 - 34.5)  # CEM stands in Table 1
    t = (34.5 - 36.11) / (statistics.stdev(measure.values()) / math.sqrt(3))
    assert test["columns"]["PPL"]["p"] == pytest.approx(stats.t.cdf(t, 2))
    text = tables.markdown(table, [])
    assert "| Ours(Soft) | paper | 33.04 ± 0.22 | 0.68 ± 0.01 |" in text
    assert "Ours(Soft) over CEM (quoted)" in text
    assert "- Ours(Hard): not trained: needs something." in text


def test_student_not_welch_and_the_right_side():
    a, b = [30.0, 31.0, 32.5], [33.0, 35.5, 34.0, 41.0]
    lower = outperforms(a, b, lower_is_better=True)
    assert lower == pytest.approx(stats.ttest_ind(a, b, alternative="less").pvalue)
    assert lower != pytest.approx(stats.ttest_ind(a, b, alternative="less", equal_var=False).pvalue)
    assert outperforms(a, b, lower_is_better=False) == pytest.approx(1 - lower)
    assert outperforms(b, a, lower_is_better=False) == pytest.approx(lower)
    assert outperforms(a, 36.11, True) == pytest.approx(
        stats.ttest_1samp(a, 36.11, alternative="less").pvalue
    )
    assert outperforms([1.0], b, True) == outperforms(a, [1.0], True) == "needs at least two seeds"


def test_table_3_is_of_the_labelled_conversations_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "is_done", lambda run: True)
    run = replace(fake_runs(Variant("soft"), 1)[0], folder=tmp_path)
    (tmp_path / "scores").mkdir()
    ranked = [["joyful", 0.5], ["angry", 0.3], ["sad", 0.2]]
    records = [
        {"conv_id": name, "turn": turn, "prediction": "i am sorry", "reference": "oh", "emotion": "sad"}
        | {"predicted_emotion": "sad" if turn == 3 else "angry", "emotions": ranked, "nll": nll, "tokens": 2}
        for name, turn, nll in (("a", 1, 9.0), ("a", 3, 4.0), ("b", 1, 7.0))
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "scores/predictions.jsonl").write_text(lines)
    labels = {"a": ("sad", "joyful"), "c": ("sad", "angry")}
    values = reproduce._measure_subset(run, labels, limit=3)  # "c" is beyond the limit
    assert values["PPL"] == pytest.approx(math.exp(4.0 / 2))  # of a's last turn
    assert (values["Acc"], values["Dist-1"]) == (100.0, 100.0)
    assert (values["R@1"], values["R@3"], values["R@relevant"]) == (1.0, 2.0, None)
    assert reproduce._measure_subset(run, {"c": ("sad", "angry")}, limit=3) == {}
    with pytest.raises(InputError, match="no predictions for 1 of 2"):
        reproduce._measure_subset(run, labels, limit=None)


def test_table_6_shows_the_settings_of_its_runs():
    model, training = PRESETS["tiny"]
    settings = Settings("tiny", model, replace(training, factor=0.01, warmup=7))
    tuned = plan.configured(Variant("soft", backbone="here/GPT"), settings)
    run = Run(Variant("soft", backbone="here/GPT"), 0, Path("run"), Path("data"), *tuned)
    assert reproduce._backbone_note([run]).startswith(
        "The backbone of ours: here/GPT; dropout 0.1, factor 0.01, warmup 7."
    )
    assert reproduce._backbone_note([]) == "No backbone was given."
