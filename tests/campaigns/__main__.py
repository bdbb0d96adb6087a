"""Campaigns against the reliability that docs/reliability.md promises.

  kill    kill -9 at random times of `ecore train` and others, then the same command again
  flip    single bits of prepared folders, runs and logs
  inputs  malformed files, flags, folders and endpoints, over all commands
  disk    full disks, read-only folders, mount points, symlinks

A case is drawn from the seed and its number alone, and one that fails prints the line that runs it again. A table of
counts ends the campaign. Exit code: 0 if all is right, 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

# Children fork: they must find one thread.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.campaigns import campaign, forge
from tests.campaigns.campaign import Campaign
from tests.campaigns.disk import Disk
from tests.campaigns.flip import Flip
from tests.campaigns.inputs import Inputs
from tests.campaigns.kill import Kill

CAMPAIGNS: dict[str, type[Campaign]] = {kind.name: kind for kind in (Kill, Flip, Inputs, Disk)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("campaign", choices=[*CAMPAIGNS, "all"])
    parser.add_argument("--cases", type=int, help="how many (default: the campaign's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, metavar="NUMBER", help="this one alone")
    arguments = parser.parse_args(argv)
    chosen = [*CAMPAIGNS.values()] if arguments.campaign == "all" else [CAMPAIGNS[arguments.campaign]]
    forge.warm_up()
    wrong = 0
    for kind in chosen:
        cases = kind.cases if arguments.cases is None else arguments.cases
        numbers = [*range(cases)] if arguments.case is None else [arguments.case]
        counts, faults = campaign.run(kind, arguments.seed, numbers)
        print(
            f"\n{kind.name}: seed {arguments.seed}, {len(numbers):,} cases\n{campaign.table(counts)}",
            flush=True,
        )
        wrong += len(faults)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
