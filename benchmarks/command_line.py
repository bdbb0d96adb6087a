"""Shared parts of the benchmarks' command lines: the parser, and the check for a device and its kernels."""

from __future__ import annotations

import argparse

import torch

from ecore_kernels.backends import BACKENDS

FUSED_BACKEND = {"cpu": "native", "cuda": "triton"}
"""The backend with the fused kernels of each device."""


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``python -m COMMAND``, whose help shows ``description`` line by line."""
    return argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def need_fused(parser: argparse.ArgumentParser, name: str, device: str, operator: str) -> None:
    """Exit with one line, which begins with ``name``, if ``device`` is missing or cannot run the fused operator."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{name}: there is no CUDA device\n")
    reasons = BACKENDS[FUSED_BACKEND[device]].why_not(operator)
    if reasons:
        parser.exit(2, f"{name}: nothing to compare: {'; '.join(reasons)}\n")
