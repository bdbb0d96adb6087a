"""The command line, ``ecore COMMAND ...``: flags in, one call of the library, lines and an exit code out.

Exit codes: 0 done; 1 training diverged, memory ran out or another training process died; 2 bad input (one line on
stderr says what); 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from ecore.cli import (
    about,
    annotate,
    answers,
    compare,
    evaluate,
    export,
    figures,
    human,
    prepare,
    reproduce,
    serve,
    train,
)
from ecore.errors import InputError

# torch takes seconds to import: commands import what they need, and `ecore --help` answers at once.

_FIRST_SPEAKS = 30.0
"""Seconds that torchrun's other processes leave the first one to say what is wrong."""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Paragraphs as written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, without the command's other flags before it."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {_printable(message)}; `{self.prog} --help` lists what there is\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding ends no work
    bad = next((text for text in argv if not text.isascii() and _is_torn(text)), None)
    if bad is not None:
        return _fail(f"{bad}: expected UTF-8 in what the command is given", 2)
    parser = _parser(argv[0] if argv else None)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\necore: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ecore ... | head`: nobody is left to read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:
        return _fail(error, 2)
    except (ArithmeticError, MemoryError) as error:
        return _fail(error, 1)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it for every command
            return _fail("the GPU's memory is full; try a smaller --batch-size (and --accumulate)", 1)
        if type(error).__name__ == "Parted":
            return _fail(error, 1)
        if "DefaultCPUAllocator" in str(error):
            return _fail(
                "memory is full; try a smaller --batch-size (and --accumulate), or a smaller model", 1
            )
        raise


def _is_torn(text: str) -> bool:
    """Return True if ``text`` holds bytes that were no UTF-8, as surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _fail(error: object, code: int) -> int:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # torchrun ends all processes when one fails: the first, which mostly fails alike, is to speak before that.
        time.sleep(_FIRST_SPEAKS)
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    print(f"ecore: error: {_printable(text)}", file=sys.stderr)
    return code


def _printable(text: str) -> str:
    """Return ``text`` as one line: messages quote what others wrote, and a terminal obeys control characters."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ecore",
        description="Empathetic dialogue over a multi-resolution emotion graph (E-CORE, EMNLP 2023).",
        epilog="start here:  ecore demo          the whole story on a built-in corpus, in minutes\n"
        "your data:   ecore prepare, then ecore train, ecore evaluate, ecore chat\n"
        "each command has its own page:  ecore train --help",
        formatter_class=_Help,
    )
    version = f"ecore {_version()}"
    parser.add_argument("--version", action="version", version=version, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (summary, declare, run) in COMMANDS.items():
        description, _, epilog = (inspect.getdoc(declare) or "").partition("\n\n")
        sub = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=epilog,
            formatter_class=_Help,
        )
        sub.set_defaults(run=run)
        if name == command:  # declaring flags may import what they are made from
            declare(sub)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("ecore")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[..., int]]] = {
    "prepare": ("turn a corpus into a prepared folder", prepare.declare_prepare, prepare.run_prepare),
    "train": ("train a model, or go on with a run", train.declare_train, train.run_train),
    "evaluate": ("score a run, or anybody's predictions", evaluate.declare_evaluate, evaluate.run_evaluate),
    "compare": ("compare two models on the same samples", compare.declare_compare, compare.run_compare),
    "generate": ("answer a dialogue, or a whole split", answers.declare_generate, answers.run_generate),
    "chat": ("talk with a model", answers.declare_chat, answers.run_chat),
    "export": ("write a run's model to a folder of its own", export.declare_export, export.run_export),
    "web": ("talk with a model in the browser", serve.declare_web, serve.run_web),
    "serve": ("answer over HTTP, as OpenAI's chat completions", serve.declare_serve, serve.run_serve),
    "figures": ("draw a run's figures, as in the paper", figures.declare_figures, figures.run_figures),
    "human": (
        "run a human evaluation: sheets for raters, and their scores",
        human.declare_human,
        human.run_human,
    ),
    "reproduce": (
        "train and show the paper's experiments",
        reproduce.declare_reproduce,
        reproduce.run_reproduce,
    ),
    "annotate": (
        "label dialogues with several emotions",
        annotate.declare_annotate,
        annotate.run_annotate,
    ),
    "demo": ("the whole story on a built-in corpus", about.declare_demo, about.run_demo),
    "info": ("what is installed, and what a run holds", about.declare_info, about.run_info),
}
