"""Pages of the documentation: their Python runs, their commands parse, and no operator is missing.

``tests/pages.py`` runs the commands, too, with the built wheel; `.ci/run` calls it.
"""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

import pytest

import ecore_kernels
from ecore.cli import COMMANDS, _parser, main
from tests.pages import PAGES, ROOT, blocks, python_alone


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command in the page's shell blocks, by what `&&`, `|` and lines part."""
    for block in (text for language, text in blocks(page) if language == "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word not in ("&&", "|", "&"):
                    command.append(word)
                elif command:
                    yield command
                    command = []


WITH_PYTHON = [page for page in PAGES if python_alone(page)]
WITH_COMMANDS = [page for page in PAGES if list(commands(page))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages name: a prepared folder, a scored run under its several names, labels."""
    folder = tmp_path_factory.mktemp("docs")
    run = folder / "ecore-demo" / "run"
    with as_file(files("ecore.data") / "sample") as corpus:
        assert main(["prepare", "--data", str(corpus), "--out", str(folder / "prepared")]) == 0
    assert main(f"train --data {folder}/prepared --out {run} --preset tiny --max-steps 2".split()) == 0
    assert main(["evaluate", str(run)]) == 0
    for name in ("run", "run-soft", "run-hard"):
        (folder / name).symlink_to(run)
    record = json.loads((run / "evaluation-test" / "predictions.jsonl").read_text().splitlines()[0])
    emotions = [record["emotion"], "proud" if record["emotion"] != "proud" else "sad"]
    (folder / "multi.jsonl").write_text(json.dumps({"conv_id": record["conv_id"], "emotions": emotions}))
    (folder / "annotated").mkdir()
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page is one session: later blocks may use the names of earlier ones."""
    monkeypatch.chdir(folder)
    names: dict = {"__name__": page.stem}
    for block in python_alone(page):
        exec(compile(block, str(page.relative_to(ROOT)), "exec"), names)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_commands_parse(page: Path) -> None:
    for command in commands(page):
        program, *arguments = command
        if Path(program).name == "ecore":
            assert arguments[0] in COMMANDS, command
            _parser(arguments[0]).parse_args(arguments)
        elif program.startswith("python") and arguments[0] == "-m" and arguments[1] != "venv":
            assert importlib.util.find_spec(arguments[1]), command


def test_operators_are_documented() -> None:
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:function|class):: ecore_kernels\.(\w+)$", page, re.MULTILINE)
    assert sorted(documented) == sorted(ecore_kernels.__all__)
