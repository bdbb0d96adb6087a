"""Packages that only reading text, labels or figures needs: prepared data is trained on and evaluated without them."""

import json
import os
import re
from pathlib import Path

import pytest

from ecore.data import text
from ecore.data.prepare import prepare
from ecore.demo import sample_corpus
from ecore.errors import InputError
from ecore.packages import needed
from ecore.training.journal import read_metrics
from tests import forked
from tests.sizes import TINY_MODEL

ROOT = Path(__file__).parents[2]
OPTIONAL = (
    "nltk",
    "vaderSentiment",
    "defusedxml",
    "tensorboard",
    "tqdm",
    "scipy",
    "matplotlib",
    "transformers",
    "fastapi",
    "uvicorn",
    "prometheus_client",
)
SCRIPT = """
import importlib, pkgutil, sys

for name in {missing!r}:
    sys.modules[name] = None  # what Python takes for a package that is not there
{work}
"""
OF_AN_EXTRA = ("ecore.serving.app", "ecore.serving.metrics", "ecore.serving.server")
"""Modules that nothing imports before their extra's packages were looked for: a web framework reads their types."""
EVERY_MODULE = f"""
import benchmarks, ecore

for package in (ecore, benchmarks):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name not in {OF_AN_EXTRA!r} and module.name != "ecore.__main__":  # which runs the command
            importlib.import_module(module.name)
"""
TRAIN = (*TINY_MODEL, "--max-steps", 4, "--batch-size", 8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The sample corpus, but no listener's turn is plain."""
    folder = tmp_path_factory.mktemp("packages")
    for file in sample_corpus().glob("*.jsonl"):
        plain = '"speaker": "listener", "text": "'
        (folder / file.name).write_text(
            file.read_text("utf-8").replace(plain, plain + "Oh (really) - "), "utf-8"
        )
    prepare(folder, folder / "prepared", progress=False)
    return folder / "prepared"


def without(missing, work):
    """A process in which the packages ``missing`` are not installed; torch, which needs none, is imported."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return forked.run(SCRIPT.format(missing=missing, work=work), environment)


def ecore(missing, *commands, typed=""):
    """Those commands, one after the other while they succeed; the exit code is the last one's."""
    argvs = [[str(a) for a in command] for command in commands]
    work = f"import io\nfrom ecore.cli import main\nsys.stdin = io.StringIO({typed!r})\n"
    work += f"for argv in {argvs!r}:\n    code = main(argv)\n    if code: break\n"
    return without(missing, work + "raise SystemExit(code)")


def test_modules_import_without_any_of_them():
    done = without(OPTIONAL, EVERY_MODULE)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def bare(prepared, tmp_path_factory):
    """A run trained, scored and asked without them, its answers, and what was printed."""
    folder = tmp_path_factory.mktemp("bare")
    done = ecore(OPTIONAL, *work(prepared, folder))
    assert done.returncode == 0, done.stderr
    return folder, done


def work(prepared, folder):
    return (
        ("train", "--data", prepared, "--out", folder / "run", *TRAIN),
        ("evaluate", folder / "run", "--limit", 8),
        ("generate", folder / "run", "--split", "test", "--limit", 40, "--out", folder / "answers.jsonl"),
        ("evaluate", "--predictions", folder / "answers.jsonl"),
        ("generate", folder / "run", "--text", "I lost my keys, all 3 of them."),
    )


def test_prepared_data_is_trained_on_evaluated_and_answered_without_them(
    prepared, bare, tmp_path, monkeypatch
):
    folder, done = bare
    assert "no progress bar: tqdm" in done.stderr
    assert "no events for TensorBoard" in done.stderr
    assert not list((folder / "run").glob("events*"))
    full = ecore((), *work(prepared, tmp_path))
    assert full.returncode == 0, full.stderr
    assert "TensorBoard" not in full.stderr
    assert list((tmp_path / "run").glob("events*"))
    # All that was printed but times, memory and paths.
    printed = [run.stdout.replace(str(where), "") for run, where in ((full, tmp_path), (done, folder))]
    measured = re.compile(r"\d+ s, [\d,]+ M")
    assert measured.sub("", printed[0]) == measured.sub("", printed[1])
    answers = [(where / "answers.jsonl").read_text() for where in (folder, tmp_path)]
    assert answers[0] == answers[1]
    losses = [[line["loss"] for line in read_metrics(where / "run")] for where in (folder, tmp_path)]
    assert losses[0] == losses[1]
    metrics = [(where / "run/evaluation-test/metrics.json").read_text() for where in (folder, tmp_path)]
    assert metrics[0] == metrics[1]
    # To find the words in these texts anew would have taken NLTK.
    monkeypatch.setattr(text, "_tokenizer", lambda: pytest.fail("NLTK"))
    texts = " ".join(json.loads(line)["reference"] for line in answers[0].splitlines())
    with pytest.raises(pytest.fail.Exception, match="NLTK"):
        text.tokenize(texts)


HARD = "I can't sleep (at all), it's so loud..."


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_a_sentence_that_is_not_plain_names_nltk(bare, tmp_path, command):
    arguments = {"generate": [bare[0] / "run", "--text", HARD], "chat": [bare[0] / "run"]}
    if command == "evaluate":
        path = tmp_path / "theirs.jsonl"
        path.write_text(json.dumps({"prediction": HARD, "reference": "Oh"}) + "\n")
        arguments["evaluate"] = ["--predictions", path]
    done = ecore(("nltk",), (command, *arguments[command]), typed=f"Hello.\n{HARD}\n")
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith("ecore: error: finding the words of a sentence")
    assert "needs the package nltk, " in said
    assert said.endswith("; pip install nltk")
    assert done.stdout.count("ecore: ") == (command == "chat")


@pytest.mark.parametrize(
    "missing, command, line",
    [
        (("vaderSentiment",), ("prepare",), r"intensity: source vader needs the package vaderSentiment"),
        (
            ("nltk",),
            ("prepare", "--intensity", "sentiwordnet"),
            "intensity: source sentiwordnet without a file",
        ),
        (("nltk",), ("prepare",), "finding the words of a sentence"),
    ],
)
def test_a_missing_package_is_one_line(missing, command, line, tmp_path):
    done = ecore(missing, (*command, "--data", sample_corpus(), "--out", tmp_path / "prepared"))
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]  # behind a progress bar
    assert "Traceback" not in done.stderr
    assert said.startswith(f"ecore: error: {line}")
    assert said.endswith(f"; pip install {missing[0]}")
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    "command, missing", [("serve", "fastapi"), ("web", "uvicorn"), ("serve", "prometheus_client")]
)
def test_the_server_names_its_extra(bare, command, missing):
    pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
    done = ecore((missing,), (command, bare[0] / "run"))
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"ecore: error: ecore {command} needs the package {missing}, ")
    assert said.endswith(f"; pip install 'ecore[{command}]'")


def test_a_plan_is_made_and_a_comparison_refused_without_scipy(prepared, bare, tmp_path):
    """A plan prints commands alone; what a comparison lacks is said before any of its table is printed."""
    table = ("reproduce", "table4", "--data", prepared, "--out", tmp_path / "paper")
    done = ecore(("scipy", "matplotlib"), (*table, "--plan"))
    assert done.returncode == 0, done.stderr
    assert "ecore train --data" in done.stdout
    for command, purpose in (
        (table, "reproduce table4"),
        (("compare", *[bare[0] / "run"] * 2), "the paired bootstrap"),
    ):
        done = ecore(("scipy", "scipy.stats"), command)
        assert (done.returncode, done.stdout) == (2, "")
        (said,) = done.stderr.splitlines()
        assert said.startswith(f"ecore: error: {purpose} needs the package scipy, ")
        assert said.endswith("; pip install 'ecore[experiments]'")


def test_labels_and_agreement_name_nltk_too(tmp_path):
    for name in ("anna", "ben"):
        labels = '{"conv_id": "a", "emotions": ["sad"]}\n{"conv_id": "b", "emotions": ["afraid"]}\n'
        (tmp_path / name).write_text(labels)
    done = ecore(("nltk",), ("annotate", "agreement", tmp_path / "anna", tmp_path / "ben"))
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert "agreement needs the package nltk" in said


def test_the_name_is_that_of_what_is_missing():
    with pytest.raises(InputError, match=r"^knitting needs the package yarn_of_nobody, .*pip install wool$"):
        needed("yarn_of_nobody.blue", "knitting", "wool")
