"""The parser that every benchmark's command line begins with."""

from __future__ import annotations

import argparse


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``python -m COMMAND``, whose help shows ``description`` line by line."""
    return argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
