"""``ecore demo`` and ``ecore info``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ecore.cli.common import add_device, device


def declare_demo(parser: argparse.ArgumentParser) -> None:
    """The whole story on a small built-in corpus: prepare, train, evaluate, answer. Minutes on any machine.

    examples:
      ecore demo
      ecore demo --out /tmp/ecore-demo --steps 300
    """
    parser.add_argument(
        "--out", type=Path, default=Path("ecore-demo"), metavar="FOLDER", help="where it works"
    )
    parser.add_argument(
        "--strategy", choices=("soft", "hard"), default="soft", help="how emotions guide the answer"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: the demo's own)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random")
    add_device(parser)


def run_demo(arguments: argparse.Namespace) -> int:
    from ecore import demo

    demo.run(
        arguments.out,
        strategy=arguments.strategy,
        steps=arguments.steps,
        seed=arguments.seed,
        device=device(arguments),
    )
    return 0


def declare_info(parser: argparse.ArgumentParser) -> None:
    """Say what is installed and which backends run here; with RUN, also what that run is and how far it came.

    `python -m ecore_kernels.verify` checks all of them here against float64.

    examples:
      ecore info
      ecore info run
    """
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN", help="folder made by `ecore train`")


def run_info(arguments: argparse.Namespace) -> int:
    from ecore_kernels import info

    print(info.report())
    if arguments.folder is not None:
        from ecore.training.run_folder import summarize

        print(f"\n{summarize(arguments.folder)}")
    return 0
