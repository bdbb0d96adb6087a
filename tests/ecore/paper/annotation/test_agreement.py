"""Agreement between sets of emotion labels."""

import pytest

from ecore.errors import InputError
from ecore.paper.annotation.agreement import alpha, label_agreement


def test_alpha_of_the_literature():
    # Krippendorff (2011), "Computing Krippendorff's alpha-reliability", section C: four observers, missing values.
    rows = {"A": "123321412   ", "B": "1233224125 3", "C": " 3332342251 ", "D": "12332441251 "}
    answers = [(name, i, value) for name, row in rows.items() for i, value in enumerate(row) if value != " "]
    assert alpha(answers) == pytest.approx(0.743, abs=5e-4)


def test_alpha_that_is_not_defined():
    assert alpha([("x", 1, "a"), ("y", 1, "a")]) is None
    assert alpha([("x", 1, "a"), ("y", 2, "b")]) is None
    assert alpha([("x", 1, "a"), ("y", 1, "b"), ("y", 2, "b"), ("x", 2, "a")]) < 0


def test_agreement_between_sets():
    one = {"a": ("sad", "afraid"), "b": ("joyful",), "c": (), "d": ("sad",)}
    two = {"a": ("afraid", "sad"), "b": ("joyful", "grateful"), "c": ()}
    result = label_agreement({"one": one, "two": two})
    (pair,) = result["pairs"]
    assert (pair["names"], pair["conversations"]) == (["one", "two"], 3)
    assert pair["jaccard"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert pair["same"] == pytest.approx(200 / 3)
    # Observed: MASI distance of {j} and {j, g} is 1 - 1/2 * 2/3 = 2/3, over six answers (d does not count) 2 * 2/3 / 6.
    # Expected: of the 30 ordered pairs of different answers four are alike; {j}-{j, g} is 2/3, all others 1.
    assert pair["alpha"] == pytest.approx(1 - (4 / 18) / ((30 - 4 - 2 + 2 * 2 / 3) / 30), abs=1e-3)
    assert result["alpha"] == pair["alpha"]
    assert result["emotions_per_sample"] == {"one": 1.0, "two": 4 / 3}


def test_agreement_needs_two_that_share_something():
    with pytest.raises(InputError, match="at least two"):
        label_agreement({"one": {"a": ()}})
    with pytest.raises(InputError, match="one and two share no conversation"):
        label_agreement({"one": {"a": ()}, "two": {"b": ()}})
