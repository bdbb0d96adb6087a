"""The plan: which runs the tables' rows need, and the settings of each."""

from dataclasses import replace
from pathlib import Path

from ecore.config import PRESETS, for_model
from ecore.data.prepared import PreparedData
from ecore.paper.experiments import plan
from ecore.paper.experiments.plan import Brought, Settings, Variant
from ecore.paper.published import HARD, SOFT, TABLES
from tests.ecore.paper.experiments.made_up import NOTHING


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
