"""The prepared data with word intensities of another source (Table 9)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ecore.data.intensity import with_floor, word_intensity
from ecore.data.prepared import PreparedData, copy_with_intensity, write_meta
from ecore.data.statistics import intensity_statistics
from ecore.errors import InputError
from ecore.files import new_folder


def with_intensity(data: PreparedData, out: Path, source: str, file: Path | None = None) -> PreparedData:
    """Make ``out``, a copy of ``data`` whose intensities are of ``source``, or open it where it is there.

    Nothing else changes, the related words of a context included: they were chosen by ``data``'s own
    intensities, so that rows of Table 9 differ in one thing. ``out`` appears when all is done, or not at all.

    Raises:
        InputError: the file cannot be used, or ``out`` was made from other scores or other data.
    """
    bare = word_intensity(data.vocabulary.words, source, file)
    floored = with_floor(bare, data.meta["intensity_floor"])
    if out.exists():
        made = PreparedData.load(out)
        same = made.meta.get("derived_from") == data.meta["fingerprint"]
        if not same or not np.array_equal(made.tables.intensity.numpy(), floored):
            raise InputError(
                f"{out}: made of other data or other {source} scores; take those again or another --out"
            )
        return made
    with new_folder(out) as folder:
        copy_with_intensity(data, folder, floored)
        meta = {
            **data.meta,
            "intensity": source,
            "intensity_file": None if file is None else Path(file).name,
            **intensity_statistics(data.train.arrays, bare, floored),
            "derived_from": data.meta["fingerprint"],
        }
        write_meta(folder, meta)
    return PreparedData.load(out)
