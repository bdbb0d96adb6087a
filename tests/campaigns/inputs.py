"""Malformed files, flags, paths and endpoints: a command works, or says in one line what is wrong, with exit code 2.

No traceback, no control characters in a message, no half result, no key of the endpoint in anything that is printed or
written.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import os
import random
import resource
import shutil
import signal
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tests.campaigns import endpoints, material, mutations
from tests.campaigns.campaign import Campaign, Verdict
from tests.campaigns.endpoints import MODES, SECRET
from tests.campaigns.forge import SUBPROCESS_EVERY, Child, Result, fault
from tests.campaigns.material import TEXT, TRAINING, Material

T = ["--threads", "1"]
PREPARE = ["prepare", "--data", "corpus", "--out", "new"]
SCORE = [
    "human",
    "score",
    "study",
    "rating-1.csv",
    "rating-2.csv",
    "ab-1.csv",
    "ab-2.csv",
    "--out",
    "new.json",
]
EXPORT = ["human", "export", "A=run/evaluation-test/predictions.jsonl", "B=other.jsonl", "--contexts", "4"]
ASK = ["annotate", "run", "--data", "corpus", "--annotator"]
GENERATE = ["generate", "run", "--text", TEXT, *T]
RESUME = ["train", "--out", "run", "--resume", "--max-steps", "6", *T]
GPT2 = ["--backbone", "gpt2", "--preset", "tiny", "--dim", "12", "--max-steps", "1", "--threads", "1"]
PREDICTIONS = "run/evaluation-test/predictions.jsonl"
FILES: list[tuple[str, str, Sequence[str]]] = [
    ("corpus/train.jsonl", "lines", PREPARE),
    ("corpus/test.jsonl", "lines", [*PREPARE, "--skip-bad"]),
    ("corpus/test.jsonl", "lines", [*ASK, "lexicon", "--out", "new"]),
    ("csv/train.csv", ",", ["prepare", "--data", "csv", "--out", "new"]),
    ("csv/valid.csv", ",", ["prepare", "--data", "csv", "--out", "new", "--skip-bad"]),
    ("glove.txt", " ", [*PREPARE, "--glove", "glove.txt"]),
    ("glove.txt.gz", "bytes", [*PREPARE, "--glove", "glove.txt.gz"]),
    ("glove.zip", "bytes", [*PREPARE, "--glove", "glove.zip"]),
    ("relations.tsv", "\t", [*PREPARE, "--relations", "relations.tsv"]),
    ("vad.tsv", "\t", [*PREPARE, "--intensity", "vad", "--intensity-file", "vad.tsv"]),
    (PREDICTIONS, "lines", ["evaluate", "--predictions", PREDICTIONS]),
    (PREDICTIONS, "lines", ["evaluate", "--predictions", PREDICTIONS, "--multi-emotion", "labels.jsonl"]),
    (PREDICTIONS, "lines", [*EXPORT, "--out", "new"]),
    ("other.jsonl", "lines", ["compare", PREDICTIONS, "other.jsonl", "--resamples", "100"]),
    ("labels.jsonl", "lines", ["evaluate", "--predictions", PREDICTIONS, "--multi-emotion", "labels.jsonl"]),
    ("labels.jsonl", "lines", [*ASK, "file", "--labels", "labels.jsonl", "--out", "new"]),
    ("labels.jsonl", "lines", ["annotate", "agreement", "labels.jsonl", "annotated/annotations.jsonl"]),
    ("annotated/review.csv", ",", ["annotate", "review", "annotated", "--out", "new.jsonl"]),
    ("annotated/labels.jsonl", "lines", ["annotate", "review", "annotated", "--out", "new.jsonl"]),
    ("rating-1.csv", ",", SCORE),
    ("ab-2.csv", ",", SCORE),
    ("study/key.json", "json", SCORE),
    (
        "prepared/meta.json",
        "json",
        ["train", "--data", "prepared", "--out", "new", *TRAINING, "--max-steps", "1"],
    ),
    ("prepared/train.texts.jsonl", "lines", [*ASK[:3], "prepared", "--annotator", "lexicon", "--out", "new"]),
    ("run/config.json", "json", GENERATE),
    ("run/config.json", "json", RESUME),
    ("run/config.json", "json", ["info", "run"]),
    ("run/config.json", "json", ["evaluate", "run", "--out", "new", *T]),
    ("run/vocabulary.json", "json", GENERATE),
    ("run/checkpoints.json", "json", GENERATE),
    ("run/checkpoints.json", "json", RESUME),
    ("run/metrics.jsonl", "lines", RESUME),
    ("run/metrics.jsonl", "lines", ["info", "run"]),
    ("answers.txt", "bytes", ["chat", "run", *T]),
    (
        "gpt2/config.json",
        "json",
        ["train", "--data", "prepared", "--out", "new", *GPT2],
    ),
    ("gpt2/tokenizer.json", "json", ["train", "--data", "prepared", "--out", "new", *GPT2]),
]
"""A file, what it is, and a command that reads it."""
COMMANDS: list[Sequence[str]] = [
    PREPARE,
    ["train", "--data", "prepared", "--out", "new", *TRAINING, "--max-steps", "1"],
    RESUME,
    ["evaluate", "run", "--out", "new", *T],
    GENERATE,
    ["generate", "run", "--split", "test", "--out", "new.jsonl", *T],
    ["compare", PREDICTIONS, "other.jsonl", "--resamples", "100"],
    [*EXPORT, "--out", "new"],
    [*ASK, "lexicon", "--out", "new"],
    [*ASK, "file", "--labels", "labels.jsonl", "--out", "new"],
    ["figures", "run", "--out", "new", "--only", "training"],
    ["reproduce", "table4", "--data", "prepared", "--out", "new", "--plan", "--preset", "tiny"],
]
"""Commands whose flags are given wrong values."""
NUMBERS = [
    *(
        "0",
        "-1",
        "1",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "2147483648",
        "9223372036854775808",
        "9" * 5000,
        "1e-46",
        "-1e308",
    ),
    *(
        "",
        " ",
        "x",
        "1.5",
        "0x10",
        "1_000",
        "٣",
        "½",
        "None",
        "\x1b[31m",
        "1e3",
        "6000000000000",
        "65536",
        "1000000",
    ),
]
PLACES = [
    "",
    ".",
    "/",
    "missing/deep",
    "glove.txt",
    "corpus",
    "loop",
    "/proc/self/mem",
    "x" * 300,
    "glove.txt/x",
]
LONG = 25.0
"""Seconds after which a command with an odd flag counts as at work."""
MEMORY = 12 << 30


class Inputs(Campaign):
    """See the module."""

    name = "inputs"
    cases = 400

    def make(self, root: Path) -> Material:
        self._port, self._server = endpoints.serve(root.parent)
        made = super().make(root)
        (root / "glove.txt.gz").write_bytes(gzip.compress(made.glove.read_bytes()))
        with zipfile.ZipFile(root / "glove.zip", "w") as archive:
            archive.write(made.glove, "glove.txt")
        (root / "answers.txt").write_text(f"{TEXT}\n/reset\nwe won.\n")
        (root / "loop").symlink_to("loop")
        backbones = importlib.util.find_spec("transformers") is not None
        self.files = [case for case in FILES if backbones or not case[0].startswith("gpt2")]
        return made

    def close(self) -> None:
        os.kill(self._server, signal.SIGKILL)
        os.waitpid(self._server, 0)

    def run(self, number: int, picks: random.Random, folder: Path) -> Verdict:
        place = folder / "work"
        shutil.copytree(self.material.root, place, symlinks=True)
        # Every mode once in a campaign of the default size; the rest in turn.
        if number % 6 == 0 and number // 6 < len(MODES):
            return self._endpoint(number // 6, place)
        kind = picks.choices(["file", "flag", "path"], [6, 4, 1])[0]
        new_process = (number + 1) % SUBPROCESS_EVERY == 0
        if kind == "file":
            return self._file(picks, place, new_process)
        return self._flag(picks, place, kind, new_process)

    def _file(self, picks: random.Random, place: Path, new_process: bool) -> Verdict:
        name, what, argv = picks.choice(self.files)
        path = place / name
        if name.startswith("gpt2"):
            if not (self.material.root / "gpt2").exists():
                material.make_backbone(self.material)
            shutil.copytree(self.material.root / "gpt2", place / "gpt2", dirs_exist_ok=True)
        content = path.read_bytes()
        if what == "bytes" or picks.random() < 0.45:
            content = mutations.bytes_of(content, picks)
        elif what in ("json", "lines"):
            content = mutations.json_of(content, picks, lines=what == "lines")
        else:
            content = mutations.table_of(content, picks, what)
        path.write_bytes(content)
        stdin = content if name == "answers.txt" else b""
        before = _listing(place)
        result = Child(argv, place, stdin=stdin, new_process=new_process).wait()
        return _judged(f"file: {argv[0]}", f"{name}: {' '.join(argv)}", result, place, before)

    def _flag(self, picks: random.Random, place: Path, kind: str, new_process: bool) -> Verdict:
        argv = [*picks.choice(COMMANDS)]
        flags = _flags(argv)
        values = NUMBERS
        if kind == "path":
            flags, values = [f for f in flags if f.type is Path] or flags, PLACES
        else:
            flags = [f for f in flags if f.type is not Path]
        chosen = picks.choice(flags)
        value = picks.choice(values)
        if "--skip-bad" not in argv and picks.random() < 0.1:
            value = "\udcff" + value  # bytes that are no UTF-8
        argv += [f"{chosen.option_strings[-1]}={value}"]
        before = _listing(place)
        child = Child(argv, place, prelude=None if new_process else _little_memory, new_process=new_process)
        if kind == "flag" and not child.ended(LONG):
            child.kill()
            child.wait()
            return Verdict(f"{kind}: {argv[0]}", "at work")
        shown = " ".join(argv).encode("utf-8", "backslashreplace").decode()
        return _judged(f"{kind}: {argv[0]}", shown[:300], child.wait(), place, before, (0, 1, 2))

    def _endpoint(self, mode: int, place: Path) -> Verdict:
        url = f"http://127.0.0.1:{self._port}/mode-{mode}/v1"
        argv = [*ASK, "endpoint", "--url", url, "--model", "m", "--out", "new", "--limit", "3", "--jobs", "2"]
        before = _listing(place)
        child = Child(argv, place, prelude=_impatient, extra={"OPENAI_API_KEY": SECRET})
        result = child.wait(60)
        name = list(MODES)[mode]
        written = b"".join(path.read_bytes() for path in (place / "new").rglob("*") if path.is_file())
        said = result.out + result.err + written.decode("utf-8", "replace")
        verdict = _judged("endpoint", name, result, place, before, whole=False)
        if SECRET.lower()[6:] in said.lower():
            return Verdict("endpoint", "FAULT", f"{name}: the key is printed or kept")
        if (self.root / "stolen").exists():
            return Verdict("endpoint", "FAULT", f"{name}: a request followed a redirect")
        if "\x1b" in result.out + result.err or b"\x1b" in written:
            return Verdict("endpoint", "FAULT", f"{name}: control characters get through")
        return verdict


def _judged(
    kind: str,
    what: str,
    result: Result,
    place: Path,
    before: dict[str, int],
    codes: Sequence[int] = (0, 2),
    whole: bool = True,
) -> Verdict:
    wrong = fault(result, codes)
    after = _listing(place)
    if not wrong and result.code and whole:
        if half := [name for name in after if name.startswith("new") and name not in before]:
            wrong = f"refused, and left {half[0]}"
        elif lost := [
            name for name, size in before.items() if name.startswith("study") and after.get(name) != size
        ]:
            wrong = f"refused, and changed {lost[0]}"
    return Verdict(
        kind,
        ("works", "no memory", "refused")[result.code] if not wrong else "FAULT",
        wrong and f"{what}: {wrong}",
    )


def _listing(place: Path) -> dict[str, int]:
    """Files by name, with their sizes."""
    return {str(p.relative_to(place)): p.stat().st_size for p in place.rglob("*") if p.is_file()}


def _flags(argv: Sequence[str]) -> list[argparse.Action]:
    """The flags with a value of a command."""
    from ecore.cli import _parser

    parser = _parser(argv[0])
    for word in argv[:2]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                parser = action.choices[word]
                break
    return [action for action in parser._actions if action.option_strings and action.nargs != 0]


def _little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _impatient() -> None:
    """Waits and deadlines of the endpoint's client in fractions of a second."""
    from ecore.paper.annotation import endpoint

    endpoint.ATTEMPTS = 2
    endpoint.LONGEST_WAIT = 0.05
    defaults = {endpoint.TIMEOUT: 0.5, endpoint.FIRST_WAIT: 0.01}
    make = endpoint.EndpointAnnotator.__init__
    make.__defaults__ = tuple(
        defaults.get(value, value) if isinstance(value, float) else value for value in make.__defaults__ or ()
    )
    make.__kwdefaults__ = {
        name: defaults.get(value, value) if isinstance(value, float) else value
        for name, value in (make.__kwdefaults__ or {}).items()
    } or None
