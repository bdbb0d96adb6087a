"""Packages that only some commands need: imported on first use; a missing one is reported in one line."""

from __future__ import annotations

import importlib
from types import ModuleType

from ecore.errors import InputError


def needed(module: str, purpose: str, install: str) -> ModuleType:
    """Import ``module`` for ``purpose``.

    Args:
        install: what pip is to install where it is missing.

    Raises:
        InputError: the module, or one that it imports, is not there.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise InputError(
            f"{purpose} needs the package {missing}, which cannot be imported ({error}); pip install {install}"
        ) from None
