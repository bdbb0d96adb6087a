"""Everything that a GPU can tell, in stages, the most telling first: ``python -m benchmarks.gpu``.

    python -m benchmarks.gpu --list                                     the stages, and how long each may take
    python -m benchmarks.gpu                                            all that need no data
    python -m benchmarks.gpu --data PREPARED --keep-weights             and the paper's training
    python -m benchmarks.gpu --stages smoke,steps --minutes 6,smoke=2   two of them, in 6 minutes
    python -m benchmarks.gpu --rehearse                                 everything on a CPU, at tiny sizes

Nothing has to be installed but torch, triton and what the stages import: packages come from this checkout, and the
compiled extension is built into a temporary folder where it is missing.

Every process of a stage has a limit. One that fails or hangs is a failure in the summary, and the next one runs; a
stage that something missing leaves out, or for which no time is left, is a failure too. The exit code is 0 where
nothing failed, 1 where something did, 2 for bad arguments, 130 after Ctrl-C.

The results' folder gets at most eight files, written while processes run: summary.md, summary.json, log.txt (4 MB at
most), results.json (every stage's rows under its name) and, with --keep-weights, four parts of 14 MB. From those,
`python -m benchmarks.gpu.weights join FOLDER --out RUN` makes a run that `ecore evaluate` and `ecore chat` take.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.command_line import parser_of
from benchmarks.gpu import stages
from benchmarks.gpu.environment import build_extension, environment, has_extension
from benchmarks.gpu.runner import ROOT, Process, Session, interrupt_on_signals
from benchmarks.gpu.stages import PAPER_STEPS, STAGES, Plan

STRATEGIES = ("soft", "hard", "none")
REHEARSED_STEPS = 60


def parser() -> argparse.ArgumentParser:
    parser = parser_of("benchmarks.gpu", __doc__)
    parser.add_argument("--list", action="store_true", help="print the stages and do nothing else")
    parser.add_argument(
        "--stages", metavar="NAME,...", help=f"which to run (default: all): {','.join(STAGES)}"
    )
    parser.add_argument(
        "--minutes",
        metavar="N,STAGE=N,...",
        default="",
        help="limits: of everything together, and of single stages instead of those that --list prints",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: benchmarks/results/NAME-OF-THE-GPU"
    )
    parser.add_argument("--data", type=Path, metavar="PREPARED", help="a folder made by `ecore prepare`")
    parser.add_argument(
        "--strategy",
        metavar="NAME,...",
        help="what `train` trains, of soft,hard,none (default: soft)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"of each training (default: the paper's {PAPER_STEPS:,})"
    )
    parser.add_argument(
        "--keep-weights",
        action="store_true",
        help="keep the first training's weights, in bfloat16 and in parts",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="a CPU stands in for the GPU; no number means anything"
    )
    return parser


class BadArgument(Exception):
    """An argument that cannot be used; the message says why."""


def names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """The comma-separated names of ``text``, each once."""
    found = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in found:
        if name not in known:
            raise BadArgument(f"{flag}: expected some of {','.join(known)}, got {name!r}")
    return found


def limits(text: str, chosen: Sequence[str]) -> tuple[float | None, dict[str, float]]:
    """Minutes of everything together, if given, and of each chosen stage."""
    total, minutes = None, {name: STAGES[name].minutes for name in chosen}
    for item in text.split(",") if text else []:
        name, equals, number = item.rpartition("=")
        if equals and name not in chosen:
            raise BadArgument(f"--minutes: {name}: expected one of the stages to run: {','.join(chosen)}")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0.0 < value < math.inf:
            raise BadArgument(f"--minutes: expected a number of minutes over 0, got {number!r}")
        if equals:
            minutes[name] = value
        elif total is not None:
            raise BadArgument(f"--minutes: two limits of everything together: {total:g} and {value:g}")
        else:
            total = value
    return total, minutes


def chosen_stages(arguments: argparse.Namespace) -> list[str]:
    """The stages to run; without --data, `train` only where it is asked for, which is refused."""
    has_data = arguments.data is not None or arguments.rehearse
    if arguments.stages is not None:
        chosen = names("--stages", arguments.stages, tuple(STAGES))
        if "train" in chosen and not has_data:
            raise BadArgument("--stages: train: expected --data with a folder made by `ecore prepare`")
        return [name for name in STAGES if name in chosen]
    if has_data:
        return list(STAGES)
    print("without --data there is no training: the stage train is not run")
    return [name for name in STAGES if name != "train"]


def check_data(folder: Path) -> Path:
    """The prepared folder as an absolute path.

    Raises:
        BadArgument: it cannot be used.
    """
    from ecore.data.prepared import PreparedData
    from ecore.errors import InputError

    try:
        PreparedData.load(folder)
    except InputError as error:
        raise BadArgument(f"--data: {error}") from None
    return folder.resolve()


def table() -> str:
    """The stages, their limits and their questions."""
    lines = [f"{'stage':10} {'minutes at most':>15}   question"]
    lines += [f"{name:10} {stage.minutes:15g}   {stage.question}" for name, stage in STAGES.items()]
    total = sum(stage.minutes for stage in STAGES.values())
    return "\n".join(
        [*lines, f"{'all':10} {total:15g}   and {stages.FILL_SECONDS / 60:g} to compile rivals before"]
    )


def default_folder(gpu: str) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu.lower())
    return ROOT / "benchmarks" / "results" / name


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.list:
        print(table())
        return 0
    sys.path += [str(ROOT / "kernels")] * (str(ROOT / "kernels") not in sys.path)
    try:
        chosen = chosen_stages(arguments)
        total, minutes = limits(arguments.minutes, chosen)
        of_training = {"--strategy": arguments.strategy, "--steps": arguments.steps}
        for flag, value in (of_training | {"--keep-weights": arguments.keep_weights or None}).items():
            if value is not None and "train" not in chosen:
                raise BadArgument(f"{flag}: is of the stage train, which is not run")
        strategies = names(
            "--strategy", "soft" if arguments.strategy is None else arguments.strategy, STRATEGIES
        )
        steps = arguments.steps
        if steps is None:
            steps = REHEARSED_STEPS if arguments.rehearse else PAPER_STEPS
        if steps < 1:
            raise BadArgument(f"--steps: expected at least 1, got {steps}")
        if not arguments.rehearse and not torch.cuda.is_available():
            raise BadArgument("torch sees no CUDA device here; --rehearse runs everything on a CPU")
        data = None if arguments.data is None else check_data(arguments.data)
    except BadArgument as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    plan = Plan(data, strategies, steps, arguments.keep_weights, arguments.rehearse)
    if arguments.rehearse:
        folder = arguments.out or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    else:
        folder = arguments.out or default_folder(torch.cuda.get_device_name())
    interrupt_on_signals()
    seconds = None if total is None else 60.0 * total
    return _run(folder.resolve(), plan, minutes, seconds)


def _run(folder: Path, plan: Plan, minutes: dict[str, float], seconds: float | None) -> int:
    from benchmarks import harness

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        scratch = Path(temporary)
        machine = harness.machine() | ({"gpu": "a rehearsal on a CPU"} if plan.rehearsal else {})
        variables = environment(scratch, ROOT / "kernels")
        session = Session(folder, scratch, variables, machine, seconds)
        try:
            session.begin_stage("set-up", math.inf)
            if not has_extension(scratch, ROOT / "kernels"):
                build_extension(session)
            if plan.rehearsal:
                from benchmarks.gpu import stand_in

                plan = stand_in.prepared(session, plan)
            session.run(Process("installation", [sys.executable, "-m", "ecore_kernels.info"], 60.0))
            stages.run(session, plan, minutes)
        except KeyboardInterrupt:
            session.interrupt()
            print(f"interrupted; results: {folder}")
            return 130
        finally:
            session.write()
        print(f"results: {folder}")
        return int(bool(session.failures))


if __name__ == "__main__":
    sys.exit(main())
