"""Two commits side by side: the statistics on injected times, the command line, and both processes on one tree."""

import contextlib
import random
import statistics

import pytest
from scipy.stats import binom

from benchmarks import __main__ as all_of_them
from benchmarks import harness
from benchmarks.compare import __main__ as compare
from benchmarks.compare import checkouts, worker
from benchmarks.compare.ratios import FEWEST_ROUNDS, Ratio, ratio
from ecore.errors import InputError
from ecore_kernels import native


def paired(slower: float, rounds: int = 31, seed: int = 0) -> tuple[list[float], list[float]]:
    """Times on a machine whose pace changes threefold between rounds and by 3 % between a round's two."""
    random_ = random.Random(seed)
    base, head = [], []
    for _ in range(rounds):
        pace = random_.uniform(1.0, 3.0)
        base.append(pace * random_.gauss(1.0, 0.03))
        head.append(pace * slower * random_.gauss(1.0, 0.03))
    return base, head


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_is_found_and_none_is_not(seed):
    found = ratio(*paired(1.08, seed=seed))
    assert found.low < 1.08 < found.high
    assert found.slower_by(5)
    assert "slower" in found.verdict
    none = ratio(*paired(1.0, seed=seed))
    assert none.low < 1.0 < none.high
    assert not none.slower_by(0.1)
    assert none.verdict == "no difference shown"
    assert "less time" in ratio(*paired(0.9, seed=seed)).verdict


def test_medians_of_the_sides_would_not_do():
    # All slow rounds fall on one side's clock alike; unpaired, their spread hides 8 %.
    base, head = paired(1.08, rounds=31, seed=3)
    assert ratio(base, head).median == pytest.approx(1.08, abs=0.02)
    random.Random(1).shuffle(head)
    assert not ratio(base, head).slower_by(5)


@pytest.mark.parametrize("rounds", [8, 9, 12, 21, 31, 100])
def test_the_interval_is_the_sign_tests(rounds):
    head = [float(i) for i in range(1, rounds + 1)]
    found = ratio([1.0] * rounds, head)
    # The k-th smallest: the largest k with 2 P(fewer than k) <= 1 %.
    k = max(k for k in range(1, rounds) if 2 * binom.cdf(k - 1, rounds, 0.5) <= 0.01)
    assert (found.low, found.high) == (k, rounds + 1 - k)
    assert found.median == statistics.median(head)


def test_too_few_rounds():
    with pytest.raises(ValueError, match=f"at least {FEWEST_ROUNDS} rounds, got 7"):
        ratio([1.0] * 7, [1.0] * 7)


def test_a_slowdown_has_to_be_large_and_supported():
    assert Ratio(1.05, 1.01, 1.1).slower_by(5)
    assert not Ratio(1.049, 1.04, 1.06).slower_by(5)  # supported, and small
    assert not Ratio(1.2, 0.99, 1.4).slower_by(5)  # large, and perhaps nothing


def sides(*, refused=None, inputs=("same", "same"), slower=1.1):
    """Two sides that answer at once, and the order in which they were asked to measure."""
    asked = []

    def side(name, number):
        def ask(request):
            if refused == name:
                return {"refused": "AttributeError: no such operator"}
            if "calls" not in request:
                return {"calls": 6 - number, "inputs": inputs[number]}
            asked.append((name, request["first"], request["calls"]))
            return {"seconds": slower if name == "head" else 1.0}

        return ask

    return {"base": side("base", 0), "head": side("head", 1)}, asked


def test_sides_take_turns_on_the_same_calls():
    ask, asked = sides()
    result = compare.measure("otsu", ask, 8)
    assert [name for name, _, _ in asked[:4]] == ["base", "head", "head", "base"]
    assert asked[0][1:] == asked[1][1:] == (0, 5)
    assert asked[2][1:] == asked[3][1:] == (5, 5)
    assert result["ratio"] == Ratio(1.1, 1.1, 1.1)
    assert compare.failures([result], 5) == ["otsu: 10.0 % slower, 5 % or more"]
    assert compare.failures([result], 11) == []


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ({"refused": "head"}, ["otsu: HEAD does not run it: AttributeError: no such operator"]),
        ({"refused": "base"}, []),
        ({"inputs": ("these", "those")}, ["otsu: HEAD does not run it: its inputs are not those of BASE"]),
    ],
)
def test_a_case_without_a_ratio_is_named(given, lines):
    result = compare.measure("otsu", sides(**given)[0], 8)
    assert "not measured" in compare.report([result])
    found = compare.failures([result], 5)
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_the_command_line():
    given = compare.parser().parse_args(["v1", "--fail-at", "5", "--cases", "otsu", "step-paper"])
    assert (given.base, given.head, given.fail_at) == ("v1", "HEAD", 5.0)
    assert given.cases == ["otsu", "step-paper"]
    assert compare.parser().parse_args(["a", "b"]).cases == list(worker.CASES)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["HEAD", "--rounds", "7"], "--rounds: expected at least 8, got 7"),
        (["HEAD", "--fail-at", "-5"], "--fail-at: expected a percentage above 0, got -5"),
        (["HEAD", "--fail-at", "nan"], "--fail-at: expected a percentage above 0, got nan"),
        (["no-such-branch"], "compare: no-such-branch: expected a commit, branch or tag"),
        (["--cases", "otsu", "--", "--output=x"], "compare: --output=x: expected a commit, branch or tag"),
    ],
)
def test_bad_input_is_one_line(given, line, capsys, monkeypatch):
    if "commit" in line:
        no_commit = "compare: git rev-parse: no reason given"  # as git answers, here or outside a repository
        monkeypatch.setattr(checkouts, "git", lambda *_: (_ for _ in ()).throw(InputError(no_commit)))
    with pytest.raises(SystemExit) as stopped:
        all_of_them.main(["compare", *given])
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


OPERATORS = [name for name in worker.CASES if not name.startswith("step-")]


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_run_on_a_side(case, monkeypatch):
    for size in ("BATCH", "WORDS", "EMOTIONS", "DIM", "VOCABULARY", "WIDTH"):
        monkeypatch.setattr(worker, size, 4)
    side, other = worker.Side("cpu", 0.0), worker.Side("cpu", 0.0)
    ready = side.answer({"case": case})
    assert ready == other.answer({"case": case})  # the same inputs
    assert ready["calls"] == 1
    assert side.answer({"case": case, "first": 0, "calls": 2})["seconds"] > 0


def test_a_training_step_runs_on_a_side(small, monkeypatch):
    monkeypatch.setattr(worker, "STEP_BATCHES", 2)
    side = worker.Side("cpu", 0.0)
    assert side.answer({"case": "step-released"})["calls"] == 1
    assert side.answer({"case": "step-released", "first": 2, "calls": 1})["seconds"] > 0


def test_what_fails_on_a_side_is_an_answer(monkeypatch):
    monkeypatch.delattr("ecore_kernels.otsu")
    answer = worker.Side("cpu", 0.0).answer({"case": "otsu"})
    assert answer["refused"].startswith("AttributeError")


@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
def test_a_process_measures_its_tree(tmp_path):
    tree = tmp_path / "head"
    tree.symlink_to(checkouts.ROOT)
    with compare.process(tree, "cpu") as ask:
        assert ask({"case": "otsu"})["calls"] >= 1
        assert ask({"case": "otsu", "first": 0, "calls": 2})["seconds"] > 0
        assert ask({"case": "no such case"})["refused"] == "KeyError: 'no such case'"


@pytest.mark.parametrize(("percent", "code"), [("5", 1), ("11", 0)])
def test_the_whole_command(percent, code, monkeypatch, tmp_path, capsys):
    ask, _ = sides(slower=1.1)

    @contextlib.contextmanager
    def trees(base, head):
        yield tmp_path / "base", tmp_path / "head"

    monkeypatch.setattr(checkouts, "checkouts", trees)
    monkeypatch.setattr(checkouts, "git", lambda *_: "1234567890abcdef")
    monkeypatch.setattr(compare, "process", lambda tree, device: contextlib.nullcontext(ask[tree.name]))
    given = ["main", "--cases", "otsu", "step-paper", "--rounds", "8", "--fail-at", percent]
    assert all_of_them.main(["compare", *given, "--out", str(tmp_path / "found.json")]) == code
    captured = capsys.readouterr()
    assert captured.out.count("10.0 % slower") == 2
    assert captured.err.count("10.0 % slower") == 2 * code
    assert [row["case"] for row in harness.read_results(tmp_path / "found.json")] == ["otsu", "step-paper"]


def test_a_side_that_ends_says_why(monkeypatch, tmp_path):
    tree = tmp_path / "base"
    tree.mkdir()
    broken = tmp_path / "worker.py"
    broken.write_text("raise ImportError('no torch here')\n")
    monkeypatch.setattr(worker, "__file__", str(broken))
    with (
        pytest.raises(InputError, match="process of base ended: ImportError: no torch here"),
        compare.process(tree, "cpu"),
    ):
        pass
