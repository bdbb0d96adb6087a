"""Files: written so that a crash leaves either the old content or the new one, and read as untrusted input."""

from __future__ import annotations

import errno
import fcntl
import glob
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from ecore.errors import InputError

# safetensors makes its files for the owner alone; a run's files should be as readable as any other.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success sync it to disk and rename it over ``path``.

    Of a symbolic link, the file that it names is written.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with names_file(path):
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Have errors of the operating system name ``path``: those of writing name a temporary file, or none.

    Raises:
        OSError: what was raised inside, of another file as it was.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)).parent != path.parent:
            raise
        # NumPy's have no number.
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from None


@contextmanager
def names_folder(temporary: Path, folder: Path) -> Iterator[None]:
    """Have errors of the operating system in ``temporary`` name ``folder``, which it becomes.

    Raises:
        OSError: what was raised inside.
    """
    try:
        yield
    except OSError as error:
        named = str(temporary) if error.filename is None else os.fsdecode(error.filename)
        named = named.replace(str(temporary), str(folder), 1)
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), named) from None


def expect_file(path: Path) -> None:
    """Check, before the work, that a file can be put at ``path``.

    Raises:
        InputError: it is a folder, or its folder does not exist or cannot be written to.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist")
    if target.is_dir():
        raise InputError(f"{path}: is a folder; expected a file to write")
    if (
        os.path.lexists(target) and not target.is_file()
    ):  # a device would be replaced, and a loop leads nowhere
        raise InputError(f"{path}: is no regular file; expected a file to write")
    check_writable(target.parent)


def expect_apart(out: Path, inputs: Iterable[Path], flag: str = "--out") -> None:
    """Check, before the work, that ``out`` is none of the ``inputs`` that it is made from.

    Raises:
        InputError: it is one of them; ``flag`` names it in the message.
    """
    if os.path.realpath(out) in map(os.path.realpath, inputs):
        raise InputError(f"{flag}: {out}: would overwrite what it is made from; choose another file")


def check_writable(folder: Path) -> None:
    """Check, before the work, that files can be written in ``folder`` and renamed there.

    Raises:
        InputError: they cannot: no rights, a read-only file system, a full disk.
    """
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        try:
            probe.write_bytes(b"\0" * 4096)
            os.replace(probe, probe)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written to ({error.strerror}); expected a folder for files"
        ) from None


def expect_folder(folder: Path) -> None:
    """Check, before the work and without making it, that ``folder`` is one or can be made, and be written in.

    Raises:
        InputError: a file is in the way, or no rights, a read-only file system, a full disk.
    """
    place = Path(os.path.realpath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{folder}: cannot be made a folder ({place} is none); expected a folder for files")
    check_writable(place)


def expect_new_folder(out: Path) -> None:
    """Check, before the work, that :func:`new_folder` can make ``out``.

    Raises:
        InputError: it holds something, cannot be written to, or cannot be replaced, as mount points.
    """
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; expected a new or empty folder")
    if out.exists() and out.samefile("."):
        raise InputError(f"{out}: is the current folder; expected a new one")
    expect_folder(out)
    if out.exists():
        target = Path(os.path.realpath(out))
        check_writable(target.parent)
        probe = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        probe.mkdir()
        try:
            os.replace(probe, target)
        except OSError as error:
            probe.rmdir()
            raise InputError(f"{out}: cannot be replaced ({error.strerror}); expected a new folder") from None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``out``, which becomes ``out`` when all is done, and is removed otherwise.

    Of a symbolic link, the folder that it names is made.
    """
    out = Path(os.path.realpath(out))
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        with suppress(InputError, OSError), locked(left, "somebody works there"):
            shutil.rmtree(left)  # who made it is dead, or it would be locked
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        with locked(temporary, "another process works there"), names_folder(temporary, out):
            yield temporary
            sync_folder(temporary)
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make ``folder`` where it is missing, and check that files can be written there.

    Raises:
        InputError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made a folder ({error.strerror})") from None
    check_writable(folder)


SUMS = "checksums.json"
"""In a sealed folder, the checksums of its other files."""


def seal_folder(folder: Path) -> None:
    """Write the checksum of every file in ``folder``, for :func:`check_folder`."""
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != SUMS}
    write_json(folder / SUMS, sums, sealed=True)


def check_folder(folder: Path) -> None:
    """Check the files of a folder that :func:`seal_folder` sealed; other folders, and files of others, pass.

    Raises:
        InputError: a file is missing or damaged.
    """
    if not (folder / SUMS).exists():
        return
    sums = read_json(folder / SUMS)
    if not isinstance(sums, dict):
        raise InputError(f"{folder / SUMS}: expected an object of files and checksums")
    for name, expected in sums.items():
        if _sha256(folder / Path(name).name) != expected:
            raise InputError(f"{folder / name}: damaged: its content does not fit its checksum in {SUMS}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def sync_folder(folder: Path) -> None:
    """Put the files in ``folder``, those in its folders and their names on disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder: Path, complaint: str) -> Iterator[None]:
    """Keep other processes that lock ``folder`` out of it, until this one ends or leaves the context.

    A file system that cannot lock folders, as some networks', keeps nobody out.

    Raises:
        InputError: one of them is at work there: ``complaint``.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise InputError(f"{folder}: {complaint}") from None
    try:
        yield
    finally:
        os.close(descriptor)


_SEAL = re.compile(rb',\n "checksum": "sha256:([0-9a-f]{64})"\n}\n\Z')
"""End of a sealed file. A checksum member in any other layout is a copy and is not checked."""


def write_json(path: Path, value: Any, sealed: bool = False) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically.

    Args:
        sealed: ``value`` is an object that gets a last member ``checksum``, of all that precedes it;
            :func:`read_json` checks it and leaves it out.
    """
    content = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    if sealed:
        body = content.removesuffix(b"\n}\n")
        content = body + b',\n "checksum": "sha256:%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path) -> Any:
    """Read JSON from ``path``.

    Raises:
        InputError: the file is missing, unreadable, not JSON (:func:`parse_json`) or not what its checksum is of.
    """
    path = Path(path)
    content = read_bytes(path)
    seal = _SEAL.search(content)
    if seal is not None:
        body = content[: seal.start()]
        if hashlib.sha256(body).hexdigest().encode() != seal[1]:
            raise InputError(
                f"{path}: damaged: its content does not fit its checksum (if you changed it, delete the line checksum)"
            )
        content = body + b"\n}\n"
    return parse_json(content, path)


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        InputError: the file is missing or unreadable.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 text that are not blank, without their ends, and their numbers from 1 on.

    Only a line feed ends a line: utterances hold other separators. A byte order mark is no part of the first line. A
    file whose name ends with ``.gz`` is unpacked.

    Raises:
        InputError: the file is missing or unreadable; or, with its line, not UTF-8.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = _decoded(raw, f"{path}:{number}", first=number == 1).rstrip("\r\n")
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _decoded(raw: bytes, where: str, first: bool) -> str:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: expected UTF-8 text, cannot be read ({error.reason})") from None


# JSON

DEEPEST = 100
"""Lists and objects inside one another that JSON may have here."""
LONGEST_INTEGER = 100
"""Digits of a whole number: tokenizers' files have 31, and 309 are more than a float can hold."""
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|-?[\w.+-]+|[\[\]{}]', re.DOTALL)


class _BadValue(Exception):
    """A token that JSON must not have here, and why not."""

    def __init__(self, token: str, why: str) -> None:
        self.token, self.why = token, why


def parse_json(text: str | bytes, where: Path | str) -> Any:
    """Return the value of JSON that somebody else may have written.

    Beyond what JSON forbids, refused are numbers that are not finite or longer than :data:`LONGEST_INTEGER` digits,
    nesting deeper than :data:`DEEPEST`, and half a surrogate pair, which no file can hold.

    Args:
        text: JSON, as bytes in UTF-8, perhaps after a byte order mark.
        where: the file that ``text`` is the whole of, whose line the message then names; or else, as text, the place
            that the message is to name.

    Raises:
        InputError: it is not such JSON; one line that says where and why.
    """
    if isinstance(text, bytes):
        number = text[: _first_bad_byte(text)].count(b"\n") + 1
        text = _decoded(text, f"{where}:{number}" if isinstance(where, Path) else where, first=True)
    else:
        text = text.removeprefix("\ufeff")
    try:
        value = _value(text)
    except json.JSONDecodeError as error:
        position, why = error.pos, f"not valid JSON ({error.msg})"
    except _BadValue as error:
        bad = error.token
        position, why = _position(text, lambda token, depth: token == bad), error.why
    except RecursionError:
        position, why = _position(text, lambda token, depth: depth > DEEPEST), _TOO_DEEP
    else:
        return value
    line = f":{text.count(chr(10), 0, position) + 1}" if isinstance(where, Path) else ""
    raise InputError(f"{where}{line}: {why}") from None


_TOO_DEEP = f"not valid JSON (nested deeper than {DEEPEST})"


def _first_bad_byte(data: bytes) -> int:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _value(text: str) -> Any:
    value = json.loads(text, parse_constant=_no_constant, parse_float=_number, parse_int=_integer)
    # Looking into the value takes as long as parsing it; few texts can hold what is looked for.
    if text.count("[") + text.count("{") > DEEPEST and _depth(text) > DEEPEST:
        raise RecursionError
    if re.search(r"\\u[dD][89a-fA-F]", text) or re.search("[\ud800-\udfff]", text):
        half = next((t for t in _TOKENS.findall(text) if t[0] == '"' and _is_torn(json.loads(t))), None)
        if half is not None:
            raise _BadValue(half, "not valid Unicode (half a surrogate pair); expected text")
    return value


def _no_constant(token: str) -> NoReturn:
    raise _BadValue(token, f"not valid JSON ({token}); expected a finite number")


def _number(token: str) -> float:
    value = float(token)
    if not math.isfinite(value):
        raise _BadValue(token, f"not usable JSON ({token[:40]}); expected a finite number")
    return value


def _integer(token: str) -> int:
    digits = len(token.lstrip("-"))
    if digits > LONGEST_INTEGER:
        raise _BadValue(token, f"a number of {digits:,} digits; expected at most {LONGEST_INTEGER}")
    return int(token)


def _is_torn(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _depth(text: str) -> int:
    return max(depth for _, _, depth in _scan(text))


def _position(text: str, found: Callable[[str, int], bool]) -> int:
    return next((position for position, token, depth in _scan(text) if found(token, depth)), 0)


def _scan(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield each token of ``text`` but commas and colons: where it begins, itself, and how deep it lies."""
    depth = 0
    for match in _TOKENS.finditer(text):
        token = match.group()
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        yield match.start(), token, depth
