"""Progress bars: tqdm's, or none where it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

__all__ = ["BARS", "tqdm"]

if TYPE_CHECKING:
    from tqdm import tqdm

    BARS: bool
else:
    try:
        from tqdm import tqdm

        BARS = True
    except ImportError:
        BARS = False

        class tqdm:
            """The part of tqdm that this package uses, without a bar: lines are still written."""

            n = 0

            def __init__(self, iterable: Iterable[Any] = (), *_: Any, **options: Any) -> None:
                self._iterable = iterable

            def __iter__(self) -> Iterator[Any]:
                return iter(self._iterable)

            def __enter__(self) -> tqdm:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def _nothing(self, *_: Any, **options: Any) -> None:
                pass

            update = set_postfix = set_postfix_str = set_description = set_description_str = close = _nothing

            @staticmethod
            def write(text: str, file: TextIO | None = None) -> None:
                print(text, file=file or sys.stdout)
