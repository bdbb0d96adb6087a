"""The paper's numbers, as they were transcribed."""

import pytest

from ecore.paper.published import CASES, EXPERIMENTS, FIGURES, HARD, SOFT, TABLES


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
