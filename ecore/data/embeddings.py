"""Pretrained word vectors, kept for the vocabulary's words alone."""

from __future__ import annotations

import codecs
import gzip
import zipfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ecore.data.intensity import is_number
from ecore.errors import InputError
from ecore.progress import tqdm

MOST_NUMBERS = 10_000
"""Numbers that a vector may have: a line with more belongs to no file of word vectors."""
MOST_VALUE = 1e6
"""Largest number in a vector; those of GloVe are under 10, and squares of these stay finite."""


def load_vectors(
    paths: Sequence[Path | str], words: Sequence[str], progress: bool = True
) -> npt.NDArray[np.float32]:
    """Vectors of ``words`` from one or several files, side by side.

    A file is GloVe text (``.txt``, ``.gz``, or a ``.zip`` with one ``.txt``), read as a stream, or ``.npz``
    with arrays ``words`` [W] and ``vectors`` [W, g]. A word that is in a file twice has its first vector.

    Returns:
        [V, G], G the widths' sum; NaN where a file has no vector for a word.

    Raises:
        InputError: a file is missing or malformed, or has none of the words.
    """
    ids = {word: i for i, word in enumerate(words)}
    parts = []
    for path in map(Path, paths):
        part = _from_npz(path, ids) if path.suffix == ".npz" else _from_text(path, ids, progress)
        if np.isnan(part).all():
            raise InputError(
                f"{path}: no vector for any word of the vocabulary; expected GloVe vectors of English words"
            )
        parts.append(part)
    return np.concatenate(parts, axis=1)


def _from_npz(path: Path, ids: dict[str, int]) -> npt.NDArray[np.float32]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            # Of a member that is no array, NumPy returns the bytes.
            words, vectors = np.asarray(arrays["words"]), np.asarray(arrays["vectors"], dtype=np.float32)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # a damaged header raises almost anything, SyntaxError among it
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: cannot be read ({reason}); expected arrays words and vectors") from None
    if words.dtype.kind != "U":
        raise InputError(f"{path}: words of type {words.dtype}; expected texts")
    if words.ndim != 1 or vectors.ndim != 2 or len(words) != len(vectors) or vectors.shape[1] > MOST_NUMBERS:
        raise InputError(f"{path}: words {words.shape} and vectors {vectors.shape}; expected [W] and [W, g]")
    rows = {ids[word]: i for i, word in reversed(list(enumerate(words.tolist()))) if word in ids}
    result = np.full((len(ids), vectors.shape[1]), np.nan, dtype=np.float32)
    result[list(rows)] = vectors[list(rows.values())]
    _check_finite(result[list(rows)], str(path))
    return result


def _check_finite(vectors: npt.NDArray[np.float32], where: str) -> None:
    # NaN means a word without a vector here, and infinity would spoil every mean.
    if not np.isfinite(vectors).all() or np.abs(vectors).max(initial=0) > MOST_VALUE:
        raise InputError(
            f"{where}: a vector's number is not finite or over {MOST_VALUE:g}; expected word vectors"
        )


def _from_text(path: Path, ids: dict[str, int], progress: bool) -> npt.NDArray[np.float32]:
    wanted = {word.encode(): i for word, i in ids.items()}
    result = None
    width = 0
    with closing(_lines(path)) as lines:
        for number, line in enumerate(tqdm(lines, desc=path.name, unit=" vectors", disable=not progress), 1):
            line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip()
            if result is None:
                width = line.count(b" ")
                if width == 0:
                    raise InputError(f"{path}:{number}: expected a word and its vector's numbers")
                if width > MOST_NUMBERS:
                    raise InputError(f"{path}:{number}: {width:,} numbers; expected at most {MOST_NUMBERS:,}")
                result = np.full((len(ids), width), np.nan, dtype=np.float32)
            # Some releases hold words with spaces in them: the vector is the last `width` fields.
            extra = line.count(b" ") - width
            if extra < 0 or (extra > 0 and is_number(line.rsplit(b" ", width + 1)[1])):
                raise InputError(
                    f"{path}:{number}: {width + extra} numbers, expected {width} as on the first line"
                )
            word, *numbers = line.rsplit(b" ", width)
            row = wanted.pop(word, None)
            if row is not None:
                try:
                    result[row] = np.array(numbers, dtype="S").astype(np.float32)
                except ValueError:
                    raise InputError(f"{path}:{number}: expected {width} numbers after the word") from None
                _check_finite(result[row], f"{path}:{number}")
    if result is None:
        raise InputError(f"{path}: empty; expected GloVe text, a word and its numbers on each line")
    return result


def _lines(path: Path) -> Generator[bytes, None, None]:
    try:
        with ExitStack() as stack:
            if path.suffix == ".gz":
                file: Iterable[bytes] = stack.enter_context(gzip.open(path))
            elif path.suffix == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(path))
                members = [name for name in archive.namelist() if name.endswith(".txt")]
                if len(members) != 1:
                    found = ", ".join(members) or "none"
                    raise InputError(
                        f"{path}: expected one .txt file inside, found {found}; name the unpacked one"
                    )
                file = stack.enter_context(archive.open(members[0]))
            else:
                file = stack.enter_context(open(path, "rb"))
            yield from file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged archive raises almost anything, NotImplementedError among it
        raise InputError(f"{path}: cannot be read ({error or type(error).__name__})") from None


def coverage(vectors: npt.NDArray[np.float32], counts: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Shares of word types and of tokens (``counts`` [V]) that have a vector in at least one file."""
    known = np.logical_not(np.isnan(vectors).all(axis=1))
    occurring = counts > 0
    return float(known[occurring].mean()), float(counts[known].sum() / max(counts.sum(), 1))
