"""The paper's experiments: what is planned, what survives interruption and failure, and the tables' arithmetic."""

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ecore.cli import main
from ecore.cli.reproduce import declare_reproduce, run_reproduce
from ecore.config import PRESETS, ModelConfig, TrainingConfig, for_model, from_dict, to_dict
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.rescore import with_intensity
from ecore.demo import sample_corpus
from ecore.errors import InputError
from ecore.paper.experiments import plan, reproduce, runs, tables
from ecore.paper.experiments.plan import Brought, Run, Settings, Variant
from ecore.paper.experiments.runs import Outcome
from ecore.paper.experiments.significance import outperforms
from ecore.paper.published import CASES, EXPERIMENTS, FIGURES, HARD, SOFT, TABLES
from ecore.pretrained import FORMAT
from ecore.training.journal import read_metrics

stats = pytest.importorskip("scipy.stats")

SMALL = (
    *("--preset", "tiny", "--dim", "12", "--feed-forward", "16", "--log-every", "5", "--limit", "8"),
    *("--threads", "1", "--device", "cpu"),
)
NOTHING = Brought("vader", False, {})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments") / "prepared"
    prepare(sample_corpus(), folder, vocabulary="train", progress=False)
    return folder


@pytest.fixture
def command(prepared, monkeypatch):
    """Run ``ecore reproduce`` on the sample corpus; processes that it starts find this package."""
    root = Path(__file__).parents[4]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(runs, "POLL", 0.02)
    threads = torch.get_num_threads()

    def call(*arguments):
        parser = argparse.ArgumentParser()
        declare_reproduce(parser)
        given = [*map(str, arguments), "--data", str(prepared), *SMALL]
        return run_reproduce(parser.parse_args(given))

    yield call
    torch.set_num_threads(threads)


def fake_runs(variant, seeds):
    model, training = PRESETS["tiny"]
    return [
        Run(variant, s, Path(f"runs/{variant.name}-seed{s}"), Path("data"), model, replace(training, seed=s))
        for s in range(seeds)
    ]


# The paper's numbers


def test_transcription_agrees_with_the_papers_sentences():
    """Section 5.1 tells gains in words; they follow from the tables' numbers alone."""
    one = TABLES["table1"].rows
    best = {column: i for i, column in enumerate(TABLES["table1"].columns)}
    ppl, dist_2, accuracy = best["PPL"], best["Dist-2"], best["Acc"]
    assert one["CEM"][ppl] - one[HARD][ppl] == pytest.approx(3.08)
    assert 100 * 3.08 / one["CEM"][ppl] == pytest.approx(8.53, abs=0.005)
    assert one[HARD][dist_2] - one["SEEK"][dist_2] == pytest.approx(0.36)
    assert 100 * 0.36 / one["SEEK"][dist_2] == pytest.approx(11.5, abs=0.05)
    assert one[HARD][accuracy] - one["KEMP"][accuracy] == pytest.approx(3.28)
    assert 100 * 3.28 / one["KEMP"][accuracy] == pytest.approx(8.34, abs=0.005)
    three = TABLES["table3"]
    recall = three.columns.index("R@3")
    assert 100 * (three.rows[SOFT][recall] / three.rows["KEMP"][recall] - 1) == pytest.approx(44.1, abs=0.05)


def test_transcription_of_rows():
    assert TABLES["table1"].rows["Transformer"] == (37.73, 0.47, 2.04, None, 3.76, 3.32, 3.14)
    assert TABLES["table4"].rows["Ours(Hard) w/o co-g"] == (35.45, 0.54, 2.70, 42.00)
    assert TABLES["table8"].rows["Ours(Soft) w/o gen-loss"] == (34.40, 0.61, 2.73, 39.37)
    assert TABLES["table9"].rows["Ours(Hard) w/o"] == (34.91, 0.57, 3.06, 40.12)
    assert TABLES["table7"].spread == {SOFT: (0.22, 0.01, 0.02, 0.13), HARD: (0.24, 0.02, 0.04, 0.09)}


def test_tables_are_whole():
    sizes = {name: len(table.rows) for name, table in TABLES.items()}
    assert list(sizes.values()) == [8, 7, 9, 4, 2, 6, 10]
    for table in TABLES.values():
        assert all(len(values) == len(table.columns) for values in table.rows.values())
        # Every table prints the whole models alike.
        for name, other in ((SOFT, f"{SOFT}-SKEP"), (HARD, f"{HARD}-SKEP")):
            values = table.rows.get(name, table.rows.get(other))
            if values is not None and table.number != 3:
                assert values[:4] == TABLES["table1"].rows[name][:4]
    assert (*TABLES, *FIGURES, CASES) == EXPERIMENTS


# The plan


def test_a_run_of_several_tables_is_planned_once(prepared, tmp_path):
    asked = ["table1", "table4", "table7", "table8", "table9"]
    rows = {table: plan.rows_of(table, NOTHING) for table in asked}
    assert rows["table1"][SOFT] == rows["table4"][SOFT] == rows["table9"][f"{SOFT}-VADER"] == Variant("soft")
    assert rows["table4"][f"{HARD} w/o co-g"] == Variant("hard", ("co-g",))
    counts = plan.seeds_of(asked, rows, None)
    # Soft and hard; 7 ablations of Table 4, 4 of Table 8, none of intensities twice; and the Transformer.
    assert len(counts) == 2 + 7 + 4 + 2 + 1
    assert counts[Variant("soft")] == 5  # as Table 7 has it
    assert counts[Variant("soft", ("co-p",))] == 1
    assert set(plan.seeds_of(asked, rows, 3).values()) == {3}

    del counts[Variant("none")]
    data = PreparedData.load(prepared)
    settings = Settings("tiny", *PRESETS["tiny"])
    planned = plan.plan_runs(counts, tmp_path, settings, {None: data, "none": data})
    assert len({run.name for run in planned}) == len(planned) == 2 * 5 + 13
    first = {run.name: run for run in planned}["hard-without-gate-g-seed0"]
    assert (first.model.strategy, first.model.ablations) == ("hard", ("gate-g",))
    assert first.model.thresholds == data.thresholds((0.0, 0.075, 0.15)) != (0.0, 0.075, 0.15)
    assert [run.training.seed for run in planned if run.variant == Variant("soft")] == [0, 1, 2, 3, 4]
    assert [run.seed for run in planned] == sorted(run.seed for run in planned)


def test_rows_that_need_more_say_so():
    assert plan.rows_of("table3", NOTHING) == dict.fromkeys((SOFT, HARD), "needs --multi-emotion FILE")
    assert set(plan.rows_of("table6", NOTHING).values()) == {"needs --backbone NAME"}
    nine = plan.rows_of("table9", NOTHING)
    assert nine[f"{SOFT}-SKEP"] == "needs --intensity-file skep=FILE"
    assert nine[f"{SOFT} w/o"] == Variant("soft", intensity="none")
    brought = Brought("skep", True, {"vad": Path("v")}, Path("labels"), "org/GPT")
    nine = plan.rows_of("table9", brought)
    assert nine[f"{HARD}-SKEP"] == Variant("hard")
    assert nine[f"{HARD}-VAD"] == Variant("hard", intensity="vad")
    assert nine[f"{HARD}-VADER"].name == "hard-intensity-vader"
    assert plan.rows_of("table6", brought)[f"{HARD}-DialoGPT"].name == "hard-GPT"
    assert plan.rows_of("table3", brought) == {SOFT: Variant("soft"), HARD: Variant("hard")}
    eight = plan.rows_of("table8", brought)
    assert eight[f"{SOFT} w/o commonsense"].name == "soft-without-commonsense"
    assert f"{SOFT} w/o commonsense" not in plan.rows_of("table8", NOTHING)


def test_rivals_are_trained_at_two_sizes():
    brought = replace(NOTHING, baselines=True)
    rows = plan.rows_of("table1", brought)
    assert rows["KEMP"] == "needs data prepared with --relations FILE"
    assert rows["CEM"] == "needs --inferences FILE"
    with_inferences = plan.rows_of("table1", replace(brought, inferences="file"))
    cem = plan.configured(with_inferences["CEM, at our size"], Settings("paper", *PRESETS["paper"]))[0]
    assert (cem.model, cem.inferences, cem.label_smoothing) == ("cem", "file", 0.0)
    assert with_inferences["MIME"].inferences is None
    assert "SEEK" not in rows
    assert isinstance(plan.rows_of("table1", replace(brought, relations=True))["KEMP"], Variant)
    assert "MIME" not in plan.rows_of("table1", NOTHING)
    settings = Settings("paper", *PRESETS["paper"])
    published, ours = (plan.configured(rows[name], settings) for name in ("MIME", "MIME, at our size"))
    assert published == (for_model(PRESETS["baseline"][0], "mime"), PRESETS["baseline"][1])
    assert ours == (for_model(PRESETS["paper"][0], "mime"), PRESETS["paper"][1])
    trained = [variant.name for variant in rows.values() if isinstance(variant, Variant)]
    assert len(set(trained)) == len(trained)  # each has a folder of its own


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


def test_a_backbone_is_fine_tuned():
    settings = Settings("paper", *PRESETS["paper"])
    plain, _ = plan.configured(Variant("hard", ("co-p",)), settings)
    assert plain == replace(settings.model, strategy="hard", ablations=("co-p",))
    model, training = plan.configured(Variant("soft", backbone="GPT"), settings)
    assert (model.backbone, model.dropout) == ("GPT", 0.1)
    assert (training.factor, training.warmup) == (0.03, 1000)
    chosen = replace(settings, training=replace(settings.training, factor=0.01))
    assert plan.configured(Variant("soft", backbone="GPT"), chosen)[1].factor == 0.01


def test_comparisons():
    names = list(TABLES["table4"].rows)
    pairs = plan.comparisons("table4", names)
    assert pairs[0] == (SOFT, f"{SOFT} w/o graph")
    assert all(a in (SOFT, HARD) and b.startswith(a) for a, b in pairs)
    assert len(pairs) == 7
    assert (HARD, "Transformer") in plan.comparisons("table1", list(TABLES["table1"].rows))
    assert plan.comparisons("table7", [SOFT, HARD]) == [(SOFT, "CEM"), (HARD, "CEM")]
    assert plan.comparisons("table9", list(TABLES["table9"].rows))[3] == (
        f"{SOFT}-SentiWordNet",
        f"{SOFT} w/o",
    )


# Tables


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


def test_rows_tell_what_failed_and_what_is_not_done():
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


# Table 9's data


def test_other_intensities_change_nothing_else(prepared, tmp_path):
    data = PreparedData.load(prepared)
    scores = tmp_path / "scores.tsv"
    scores.write_text("happy\t0.95\nsad\t0.1\n")
    made = with_intensity(data, tmp_path / "skep", "skep", scores)
    prepare(
        sample_corpus(),
        tmp_path / "whole",
        vocabulary="train",
        intensity="skep",
        intensity_file=scores,
        progress=False,
    )
    whole = PreparedData.load(tmp_path / "whole")
    assert torch.equal(made.tables.intensity, whole.tables.intensity)
    assert not torch.equal(made.tables.intensity, data.tables.intensity)
    for key in ("intensity", "intensity_file", "thresholds", "intensity_shares", "vocabulary_fingerprint"):
        assert made.meta[key] == whole.meta[key]
    assert made.meta["fingerprint"] == whole.meta["fingerprint"]
    assert np.array_equal(np.load(made.folder / "test.samples.npy"), np.load(prepared / "test.samples.npy"))
    assert with_intensity(data, tmp_path / "skep", "skep", scores).meta == made.meta
    scores.write_text("happy\t0.9\n")
    with pytest.raises(InputError, match="skep: made of other data or other skep scores"):
        with_intensity(data, tmp_path / "skep", "skep", scores)
    assert with_intensity(data, tmp_path / "none", "none").thresholds((0.0, 0.075)) == (0.0, 0.0)


def test_other_intensities_of_a_folder_that_is_read_only_and_holds_more(prepared, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(prepared, given)
    (given / ".ipynb_checkpoints").mkdir()
    for path in given.iterdir():
        path.chmod(0o555 if path.is_dir() else 0o444)
    data = PreparedData.load(given)
    # Inside of it, too.
    for out in (tmp_path / "none", given / "none"):
        made = with_intensity(data, out, "none")
        assert {path.name for path in out.iterdir()} == {path.name for path in prepared.iterdir()}
        assert os.access(made.folder / "meta.json", os.W_OK)


@pytest.mark.parametrize("used", [True, False])
def test_no_ablation_of_relations_that_nothing_uses(prepared, monkeypatch, tmp_path, used):
    data = PreparedData.load(prepared)
    monkeypatch.setitem(data.meta, "relations", "relations.tsv")
    monkeypatch.setattr(PreparedData, "load", lambda *_: data)
    planned = []
    monkeypatch.setattr(reproduce, "execute", lambda runs, *_, **__: planned.extend(runs) or Outcome())
    model, training = PRESETS["tiny"]
    settings = Settings("tiny", replace(model, commonsense=used), training)
    reproduce.reproduce(["table8"], prepared, tmp_path / "out", settings, progress=False)
    assert any("commonsense" in run.name for run in planned) == used


# Settings


def test_settings_that_contradict_are_refused(prepared, tmp_path):
    data = PreparedData.load(prepared)
    model, training = PRESETS["tiny"]
    settings = Settings("tiny", model, training, limit=8)
    settings.agree(tmp_path / "out", data)
    settings.agree(tmp_path / "out", data)
    for flag, other in {
        "--steps: .* was begun with 500, not 7": replace(settings, training=replace(training, max_steps=7)),
        "--warmup: .* was begun with 100, not 9": replace(settings, training=replace(training, warmup=9)),
        "--no-graph-norm: .* True, not False": replace(settings, model=replace(model, graph_norm=False)),
        "--limit: .* was begun with 8, not none": replace(settings, limit=None),
        "--preset: .* tiny, not paper": replace(settings, preset="paper"),
    }.items():
        with pytest.raises(InputError, match=f"^{flag}.*or another --out$"):
            other.agree(tmp_path / "out", data)
    scores = tmp_path / "scores.tsv"
    scores.write_text("happy\t0.95\n")
    with pytest.raises(InputError, match=r"^--data: .* was begun with"):
        settings.agree(tmp_path / "out", with_intensity(data, tmp_path / "skep", "skep", scores))
    settings_file = tmp_path / "out" / "settings.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"format": 1}))
    with pytest.raises(InputError, match=r"its runs are of format 1, those of now of .* take another --out$"):
        settings.agree(tmp_path / "out", data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds something else"):
        settings.agree(tmp_path / "mine", data)


def test_a_folder_is_taken_until_its_last_process_has_ended(prepared, tmp_path):
    model, training = PRESETS["tiny"]
    run = Run(Variant("soft"), 0, tmp_path / "run", prepared, model, training)
    with reproduce._alone(tmp_path):
        left_behind = runs._Process(run, tmp_path, {})
    try:
        with pytest.raises(InputError, match="is at work there"), reproduce._alone(tmp_path):
            pass
    finally:
        left_behind.kill()
    with reproduce._alone(tmp_path):
        pass


def test_what_cannot_be_used_is_told_in_a_line(command, tmp_path, capsys):
    with pytest.raises(InputError, match=r"^--seeds: expected at least 1, got 0"):
        command("table7", "--out", tmp_path / "o", "--seeds", 0)
    with pytest.raises(InputError, match=r"^--sample: expected 0 to 123, got 124"):
        command("figure5", "--out", tmp_path / "o", "--sample", 124)
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"conv_id": "nobody", "emotions": ["sad", "joyful"]}\n')
    with pytest.raises(InputError, match=r"labels\.jsonl:1: no conversation 'nobody'"):
        command("table3", "--out", tmp_path / "o", "--multi-emotion", labels)
    with pytest.raises(SystemExit):
        command("table9", "--out", tmp_path / "o", "--intensity-file", "vader=x")
    assert "expected skep=FILE, vad=FILE or sentiwordnet=FILE" in capsys.readouterr().err
    out = tmp_path / "o"
    assert command("table6", "--out", out) == 0  # nothing to train, but a table
    assert "needs --backbone" in (out / "table6.md").read_text()
    with (
        reproduce._alone(out),
        pytest.raises(InputError, match=r"another `ecore reproduce` is at work there"),
    ):
        command("table6", "--out", out)
    with pytest.raises(InputError, match=r"^--steps: .* was begun with 500, not 6; "):
        command("table6", "--out", out, "--steps", 6)


def test_word_vectors_too_wide_are_told_before_any_run(tmp_path):
    (tmp_path / "glove.txt").write_text("sad " + " ".join(["0.1"] * 13) + "\n")
    data = tmp_path / "prepared"
    prepare(sample_corpus(), data, glove=[tmp_path / "glove.txt"], vocabulary="train", progress=False)
    model, training = PRESETS["tiny"]
    settings = Settings("tiny", replace(model, dim=12), training)
    with pytest.raises(
        InputError, match=r"^--dim: expected at least 13, the width of .*word vectors, got 12$"
    ):
        reproduce.reproduce(["table1"], data, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    # Where nothing takes them, as on a backbone, their width does not matter.
    reproduce.reproduce(["table6"], data, tmp_path / "out", settings)


def test_what_a_row_has_no_use_for_is_left_out():
    """The plain Transformer has no emotions to start from, and a backbone none of the word-level decoder's settings."""
    model, training = PRESETS["tiny"]
    settings = Settings("tiny", replace(model, emotion_start=True, copy=True, tie_embeddings=True), training)
    plain, _ = plan.configured(Variant("none"), settings)
    assert (plain.emotion_start, plain.copy, plain.tie_embeddings) == (False, True, True)
    soft, _ = plan.configured(Variant("soft"), settings)
    assert soft.emotion_start
    tuned, _ = plan.configured(Variant("soft", backbone="GPT"), settings)
    assert (tuned.emotion_start, tuned.copy, tuned.tie_embeddings) == (False, False, False)


def test_table_6_tells_what_its_runs_took():
    model, training = PRESETS["tiny"]
    settings = Settings("tiny", model, replace(training, factor=0.01, warmup=7))
    tuned = plan.configured(Variant("soft", backbone="here/GPT"), settings)
    run = Run(Variant("soft", backbone="here/GPT"), 0, Path("run"), Path("data"), *tuned)
    assert reproduce._backbone_note([run]).startswith(
        "The backbone of ours: here/GPT; dropout 0.1, factor 0.01, warmup 7."
    )
    assert reproduce._backbone_note([]) == "No backbone was given."


# Runs


def test_what_counts_as_done(tmp_path):
    folder = tmp_path / "soft-seed0"
    folder.mkdir()
    run = replace(fake_runs(Variant("soft"), 1)[0], folder=folder)
    assert run.training.max_steps == 500
    assert runs.steps_of(run) == 0
    (folder / "checkpoints.json").write_text('{"best": null, "last": "checkpoint-000400"}')
    (folder / "metrics.jsonl").write_text('{"step": 400, "loss": 1}\n{"step": 4')  # torn by a crash
    assert runs.steps_of(run) == 400
    assert not runs.is_done(run)
    (folder / "evaluation-test").mkdir()
    (folder / "evaluation-test/metrics.json").write_text("{}")  # somebody scored it on its way
    assert not runs.is_done(run)
    (folder / "scores").mkdir()
    (folder / "scores/metrics.json").write_text("{}")  # what `reproduce` writes, last of all
    assert not runs.is_done(run)
    settings = {"model": to_dict(run.model), "training": to_dict(run.training)}
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, "data": {}, **settings}))
    assert runs.is_done(run)
    assert not runs.is_done(replace(run, model=replace(run.model, backbone="another")))


def test_interrupted_and_gone_on_with(command, prepared, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the first of two runs: it keeps its steps and goes on from them, the second is not begun."""
    out, seen = tmp_path / "out", runs.steps_of

    def interrupting(run):
        step = seen(run)
        if 5 <= step < 150 and not interrupted:
            interrupted.append(step)
            signal.raise_signal(signal.SIGINT)
        return step

    interrupted = []
    monkeypatch.setattr(runs, "steps_of", interrupting)
    given = ("--out", out, "--steps", 150, "--checkpoint-every", 150)
    assert command("table7", *given, "--seeds", 1) == 130
    assert interrupted
    assert "the same command goes on" in capsys.readouterr().err
    assert "soft-seed0 not done" in (out / "table7.md").read_text()
    kept = json.loads((out / "runs/soft-seed0/checkpoints.json").read_text())["last"]
    assert kept != "checkpoint-000150"
    assert not (out / "runs/hard-seed0").exists()

    kept_settings = json.loads((out / "settings.json").read_text())
    settings = Settings(
        "tiny",
        from_dict(ModelConfig, kept_settings["model"]),
        from_dict(TrainingConfig, kept_settings["training"]),
    )
    one = plan.plan_runs({Variant("soft"): 1}, out, settings, {None: PreparedData.load(prepared)})
    outcome = runs.execute(one, out / "logs", preset="tiny", limit=8, threads=1, progress=False)
    assert (outcome.failures, outcome.interrupted) == ({}, False)
    assert runs.is_done(one[0])
    assert [line["step"] for line in read_metrics(one[0].folder)] == [1, *range(5, 151, 5)]
    log = (out / "logs/soft-seed0.log").read_text()
    assert f"steps {int(kept.removeprefix('checkpoint-'))} to 150" in " ".join(log.split())


def test_a_failed_run_loses_no_other(command, tmp_path, capsys):
    """And what is done is not done again: not the training where only the scores are gone."""
    out = tmp_path / "out"
    given = ("table7", "--out", out, "--seeds", 1, "--steps", 2, "--jobs", 2)
    assert command("table6", *given[1:]) == 0
    (out / "runs").mkdir()
    (out / "runs/hard-seed0").touch()  # a file where the run's folder should be
    assert command(*given) == 1
    said = capsys.readouterr().err
    assert "ecore: error: hard-seed0 failed: " in said
    assert "a file is in the way" in said
    text = (out / "table7.md").read_text()
    assert "| **ours**, 1 seed |" in text
    assert "| **ours**, failed | – |" in text
    assert "a file is in the way" in text
    before = json.loads((out / "table7.json").read_text())["rows"][0]

    (out / "runs/hard-seed0").unlink()
    weights = out / "runs/soft-seed0/checkpoint-000002.safetensors"
    written = weights.stat().st_mtime_ns
    (out / "runs/soft-seed0/scores/metrics.json").unlink()
    # A look by other means changes no table.
    assert main(["evaluate", str(out / "runs/soft-seed0"), "--limit", "3"]) == 0
    assert command(*given) == 0
    assert "2 runs of 2 steps: 0 done, 1 begun, 1 to begin" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == written
    soft, hard = json.loads((out / "table7.json").read_text())["rows"]
    assert soft == before
    metrics = json.loads((out / "runs/hard-seed0/scores/metrics.json").read_text())
    assert metrics["samples"] == 8
    assert hard["ours"]["PPL"]["values"] == [metrics["ppl_per_sample"]]
    assert hard["ours"]["Acc"]["mean"] == metrics["accuracy"]
    assert command("cases", *given) == 0
    assert "2 runs of 2 steps: 2 done, 0 begun, 0 to begin" in capsys.readouterr().out
    shown = json.loads((out / "cases.json").read_text())
    assert len(shown) == 5
    assert set(shown[0]["answers"]) == {SOFT, HARD}


def test_a_process_whose_parent_died_stops_with_a_checkpoint(command, prepared, tmp_path):
    model = ModelConfig(dim=12, encoder_blocks=1, decoder_blocks=1, feed_forward=16)
    training = TrainingConfig(max_steps=100_000, log_every=1, checkpoint_every=100_000)
    job = {"folder": str(tmp_path / "run"), "data": str(prepared), "model": to_dict(model)}
    job |= {"training": to_dict(training), "preset": "tiny", "limit": 8, "device": "cpu", "threads": 1}
    log = (tmp_path / "log").open("wb")
    with (
        log,
        subprocess.Popen(
            [sys.executable, "-m", "ecore.paper.experiments.worker"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        while not (tmp_path / "run/metrics.jsonl").exists() or not read_metrics(tmp_path / "run"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        process.stdin.close()  # as the system does when the parent is gone
        assert process.wait(timeout=60) == 130
    assert (tmp_path / "run/checkpoints.json").exists()
