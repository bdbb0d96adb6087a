"""Run what README and the pages of docs/ tell readers to run, with the package that is installed.

    python tests/pages.py [PAGE ...]        README, first-hour, ...; without names, all pages

It is for an environment that holds the built wheel and nothing else: the pages' own `pip install` lines bring the
extras that they name. A page is a session in a folder of its own, from its first block to its last; there it finds
what other pages make, and stand-ins of what is fetched (:func:`make_given`). bash runs the shell blocks. In it,
`ecore`, `python` and `pip` are functions that hand their words to this process, which has imported torch and forks a
child for each: importing takes longer than most commands. What is long gets flags that make it short (:data:`SHORT`),
and what cannot run here is skipped for a reason (:data:`SKIPPED`). Exit code: 0 if everything else ran, 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import importlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]

SKIPPED = {
    r"^python3 -m venv ": "this environment is what it makes",
    r"^pip install -c constraints\.txt \.$": "the wheel is installed",
    r"^pip install .*\[dev\]$": "the environment of the tests",
    r"^pytest ": "the tests themselves",
    r"^python -m tests\.campaigns (kill|flip|inputs|disk|all) ": "a test runs them",
    r"^python -m tests\.campaigns\.fuzz ": "needs atheris",
    r"\.push_to_hub\(": "needs an account of the Hugging Face hub",
}
"""Commands, and blocks of Python, that do not run, by what is in them, and why."""

SHORT = {
    r"ecore demo$": "--steps 2",
    r"ecore train ": "--preset tiny --max-steps 2 --validate-limit 16",
    r"ecore evaluate (?!.*--multi-emotion)": "--limit 16",
    r"ecore reproduce ": "--preset tiny --steps 2 --limit 16 --seeds 1",
    # Each run of a table is a process that imports torch: a table of two is trained.
    r"ecore reproduce (?!.*--out short )": "--plan",
}
"""Flags that are put behind a command's own, by what is in it: of a flag that comes twice, the last one counts."""

ONCE = r"^(pip install|ecore figures run --out figures$)"
"""Commands that are skipped where an earlier page has run the same."""

GIVEN = {
    "baselines": ["prepared"],
    "figures": ["run", "run-soft", "run-hard"],
    "multi-emotion": ["prepared", "run"],
    "pretrained": ["prepared"],
    "reproduction": ["ed-no-floor"],
    "talking": ["ecore-demo/run"],
    "training": ["ed-prepared"],
}
"""The prepared folders and runs that a page has from commands of another."""

TYPED = b"My dog died.\nHe was twelve.\n"
"""Input for the commands that read from a terminal."""

SHELL = r"""
curl() { command curl -fsS "$@" && echo; }
set -euo pipefail
ask() { printf '%s\0' "$#" "$@" >&$QUESTIONS; read -r code <&$ANSWERS; return "$code"; }
for name in ecore pip pytest python python3; do eval "$name() { ask $name \"\$@\"; }"; done
"""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the page's fenced blocks, (language, text), without the indentation of a list that they stand in."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [
        (language, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)) for indent, language, code in fenced
    ]


def python_alone(page: Path) -> list[str]:
    """Return the page's blocks of Python that need neither an account nor a server, which tests run in the checkout."""
    code = [text for language, text in blocks(page) if language == "python"]
    return [text for text in code if not re.search(r"\.push_to_hub\(|OpenAI\(", text)]


def make_given(folder: Path) -> int:
    """Make what pages name and do not make: ``prepared``, ``run`` with its answers, and files."""
    from ecore.cli import main
    from ecore.demo import sample_corpus

    shutil.copytree(sample_corpus(), folder / "my_corpus")
    prepared, run = folder / "prepared", folder / "run"
    for command in (
        f"prepare --data {folder / 'my_corpus'} --out {prepared}",
        f"train --data {prepared} --out {run} --preset tiny --max-steps 2 --validate-limit 16",
        f"evaluate {run}",
    ):
        if main(command.split()):
            return 1
    answers = (run / "evaluation-test/predictions.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in answers.splitlines()]
    for name in ("soft", "hard", "transformer"):
        said = [{**record, "prediction": f"{record['prediction']} {name}"} for record in records]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in said))
    first = records[0]["emotion"]
    other = next(record["emotion"] for record in records if record["emotion"] != first)
    label = json.dumps({"conv_id": records[0]["conv_id"], "emotions": [first, other]})
    for name in ("multi.jsonl", "labels.jsonl"):
        (folder / name).write_text(label)
    for name in ("skep.tsv", "vad.tsv", "sentiwordnet.tsv"):
        (folder / name).write_text("dog\t0.6\nlost\t0.1\nhappy\t0.9\n")
    (folder / "glove.6B.300d.txt").write_text("dog 0.1 0.2\nlost -0.1 0.3\n")
    (folder / "other").symlink_to("annotated")  # the second annotator agrees
    with gzip.open(folder / "relations.tsv.gz", "wt") as file:
        file.write("dog\tIsA\tanimal\t2.0\n")
    # Of the clone, and no module of the package.
    for name in ("ecore/data/sample", "tests", "examples", "benchmarks", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    return 0


def make_gpt2(folder: Path) -> None:
    """Make a tiny GPT-2 in the place of the one that would be fetched."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=[end], initial_alphabet=letters))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=len(fast), n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def fill_sheets(study: Path) -> None:
    """Do the raters' work: each sheet of the study as it comes back, in this folder."""
    for sheet in study.glob("rater-*/*.csv"):
        with open(sheet, encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
        answer = "tie" if header[-1] == "choice" else "3"
        filled = [[cell or answer for cell in row] for row in rows]
        with open(sheet.name, "w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([header, *filled])


class Annotator(BaseHTTPRequestHandler):
    """A language model that finds the same two emotions in every dialogue."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": '["sad", "lonely"]'}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def annotate(port: int) -> int:
    """Serve :class:`Annotator` until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    HTTPServer(("127.0.0.1", port), Annotator).serve_forever()
    return 0


def call(words: list[str]) -> int:
    """Run a command in this process and return its exit code."""
    program, *arguments = words
    if program == "pip":
        # What is installed is the wheel, and here is no folder of sources.
        arguments = [re.sub(r"^\.\[", "ecore[", word) for word in arguments]
        return subprocess.run([sys.executable, "-m", "pip", "-q", *arguments]).returncode
    if program == "ecore":
        from ecore.cli import main
        from ecore.data import corpus

        corpus.download = lambda folder: shutil.copytree("my_corpus", folder)
        return main(arguments)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def fork(work: Callable[[], int], log: BinaryIO) -> int:
    """Start ``work``, whose result is an exit code, in a child that writes to ``log``; return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    signal.alarm(1200)  # a command that hangs is killed; beside the tests one of 20 seconds may take minutes
    code = 1
    try:
        typed, typing = os.pipe()
        os.write(typing, TYPED)
        os.close(typing)
        for number, file in enumerate((typed, log.fileno(), log.fileno())):
            os.dup2(file, number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is one of several processes
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def one_word(stream: BinaryIO) -> str:
    """Read up to the next zero byte; "" at the end."""
    return b"".join(iter(lambda: stream.read(1).replace(b"\0", b""), b"")).decode()


class Session:
    """One page that is run: its folder, the names of its Python, its servers, and how often something failed."""

    def __init__(self, page: Path, folder: Path, given: Path, done: set[str]) -> None:
        self.name, self.blocks, self.folder = page.stem, blocks(page), folder
        self._given, self._done = given, done
        self.failures = 0
        self.matched: set[str] = set()
        self._names: dict[str, object] = {"__name__": page.stem}
        self._server: int | None = None
        with socket.socket() as free:  # in the place of 8000, which others may have
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        shutil.copytree(given, folder, symlinks=True, ignore=shutil.ignore_patterns("prepared", "run"))
        for name in GIVEN.get(page.stem, ()):
            shutil.copytree(given / ("run" if "run" in name else "prepared"), folder / name)

    def run(self) -> None:
        """Run all blocks, one after the other."""
        os.chdir(self.folder)
        for language, text in self.blocks:
            text = text.replace(".venv/bin/", "").replace(":8000", f":{self._port}")
            text = text.replace("for seed in 0 1", "for seed in 0")  # the second seed shows nothing new
            if language == "sh":
                self._shell(text)
            elif language == "python":
                self._step(text, lambda log, text=text: self._python(text, log))
        self._end_server()

    def _shell(self, block: str) -> None:
        r"""Let bash run a block, and answer its functions: a number of words and the words, each ended by ``\0``."""
        questions, asking = os.pipe()
        answering, answers = os.pipe()
        shell = subprocess.Popen(
            ["bash", "-c", SHELL + block],
            env={**os.environ, "QUESTIONS": str(asking), "ANSWERS": str(answering)},
            pass_fds=(asking, answering),
            stdin=subprocess.DEVNULL,
        )
        os.close(asking)
        os.close(answering)
        with open(questions, "rb") as asked, open(answers, "w", buffering=1) as answer:
            while number := one_word(asked):
                code = self._command([one_word(asked) for _ in range(int(number))])
                answer.write(f"{code}\n")
        if shell.wait():
            self.failures += 1
            print(f"FAILED: {self.name}: exit code {shell.returncode} of the block\n{block}")

    def _command(self, words: list[str]) -> int:
        """Run a command that bash asks for, and return its exit code."""
        command = " ".join(words)
        for pattern, flags in SHORT.items():
            if re.search(pattern, command):
                self.matched.add(pattern)
                words = [*words, *flags.split()]
        if command.startswith(("ecore serve ", "ecore web ")):
            words = [*words, "--port", str(self._port)]
            return self._step(command, lambda log: self._serve(lambda: call(words), log))
        if command.startswith("ecore annotate run "):
            self._step("a language model", lambda log: self._serve(lambda: annotate(self._port), log))
        if command.startswith("ecore human score "):
            fill_sheets(Path(words[3]))
        if command == "ecore chat paper/runs/soft-seed0":  # of a table that was only planned
            shutil.copytree(self._given / "run", words[2])
        if "--backbone" in words:
            make_gpt2(Path(words[words.index("--backbone") + 1]))
        return self._step(command, lambda log: ended(fork(lambda: call(words), log)))

    def _serve(self, work: Callable[[], int], log: BinaryIO) -> int:
        """Start a server, which ends before the next and with the page, and return 0 when it listens."""
        self._end_server()
        server = fork(work, log)
        while os.waitpid(server, os.WNOHANG) == (0, 0):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self._port)) == 0:
                    self._server = server
                    return 0
            time.sleep(0.1)
        return 1

    def _end_server(self) -> None:
        if self._server is not None:
            os.kill(self._server, signal.SIGTERM)
            code = ended(self._server)
            self._server = None
            if code:
                self.failures += 1
                print(f"FAILED: exit code {code} of the server behind SIGTERM")

    def _python(self, code: str, log: BinaryIO) -> int:
        """Run a block of Python, which knows the names of the blocks before, and return 1 for an exception."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                exec(compile(code, self.name, "exec"), self._names)
            return 0
        except Exception:
            traceback.print_exc(file=said)
            return 1
        finally:
            log.write(said.getvalue().encode())

    def _step(self, text: str, work: Callable[[BinaryIO], int]) -> int:
        """Do one thing, unless it is to be skipped; print a line, and where it fails all that it said."""
        importlib.invalidate_caches()  # pip may have installed something
        title = f"{self.name}: {text.strip().splitlines()[0]}"
        for pattern, reason in SKIPPED.items():
            if re.search(pattern, text):
                self.matched.add(pattern)
                print(f"   skipped {title} ({reason})")
                return 0
        if re.search(ONCE, text) and text in self._done:
            print(f"      done {title}")
            return 0
        self._done.add(text)
        start = time.monotonic()
        with tempfile.TemporaryFile() as log:
            code = work(log)
            print(f"{time.monotonic() - start:6.1f} s  {title}")
            if code:
                self.failures += 1
                log.seek(0)
                print(f"FAILED: exit code {code}\n{log.read().decode(errors='replace')}")
        return code


def main() -> int:
    """Run the pages and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="README, first-hour, ...")
    names = parser.parse_args().pages
    os.environ.update(OMP_NUM_THREADS="1", PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
    sys.path[0] = ""  # as for readers, and not the folder of this file
    import torch
    import torch._dynamo  # optimizers import it
    import torch.utils.tensorboard

    import ecore
    import ecore_kernels.info  # noqa: F401

    if Path(ecore.__file__).parent == ROOT / "ecore":
        parser.error(f"{ecore.__file__}: expected an installed package, not the sources")
    torch.set_num_threads(1)
    # What pages say without an extra is tried before a page brings one.
    pages = sorted(PAGES, key=lambda page: any("pip install" in code for _, code in blocks(page)))
    failures = 0
    done: set[str] = set()
    unmatched = {*SKIPPED, *SHORT}
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryFile() as log:
        given = Path(work) / "given"
        given.mkdir()
        if ended(fork(lambda: make_given(given), log)):
            log.seek(0)
            sys.exit(f"pages: failed: what pages take as given\n{log.read().decode()}")
        for page in pages:
            if not names or page.stem in names:
                session = Session(page, Path(work) / page.stem, given, done)
                session.run()
                failures += session.failures
                unmatched -= session.matched
    if unmatched and not names:
        print(f"FAILED: nothing matches {unmatched}")
    print(f"{failures} failures")
    return int(failures > 0 or (bool(unmatched) and not names))


if __name__ == "__main__":
    sys.exit(main())
