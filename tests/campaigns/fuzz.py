"""Coverage-guided fuzzing of what reads files of others: corpora, word vectors and JSON.

``python -m tests.campaigns.fuzz TARGET --minutes 10`` needs the package atheris (``pip install atheris``), which is no
dependency of the project. A finding ends the run with its traceback and a file that holds the input;
``--replay FILE`` runs the target on such a file, without atheris. What holds for every input is in :data:`TARGETS`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    atheris = None  # the targets run without it, too

with contextlib.nullcontext() if atheris is None else atheris.instrument_imports(include=["ecore"]):
    from ecore.data import corpus, embeddings
    from ecore.errors import InputError
    from ecore.files import DEEPEST, parse_json, read_json

WORDS = ("<pad>", "dog", "sad", ".", "naïve")
HEADER = ",".join(corpus.CSV_COLUMNS)
ROWS = "t:0,1,sad,My dog died.,8,My dog died_comma_ yes.,5|5|5_2|2|5,\nt:0,2,sad,My dog died.,9,Sorry!,5|5|5_2|2|5,\n"
RECORD = {
    "conv_id": "t:0",
    "emotion": "sad",
    "situation": "My dog died.",
    "utterances": [
        {"speaker": "speaker", "text": "It died."},
        {"speaker": "listener", "text": "Oh — no 😢."},
    ],
}


def refused(work: Callable[[], Any]) -> tuple[Any, str]:
    """The value that ``work`` returns, and the complaint of an InputError; any other error is a finding."""
    try:
        return work(), ""
    except InputError as error:
        return None, str(error) or "nothing said"


def check_corpus(path: Path) -> None:
    """Strict and lenient reading agree, and what was read are dialogues."""
    strict, complaint = refused(lambda: corpus.read_split(path))
    lenient, _ = refused(lambda: corpus.read_split(path, skip_bad=True))
    if not complaint:
        assert lenient == strict
        assert strict[1] == 0
    for conversation in lenient[0] if lenient else ():
        assert conversation.turns
        assert conversation.emotion.strip()
        json.dumps([conversation.conv_id, conversation.situation, conversation.turns]).encode()
        "".join((conversation.conv_id, conversation.situation, *conversation.turns)).encode()


def check_vectors(path: Path) -> None:
    """Vectors are finite, and as wide as promised."""
    vectors, _ = refused(lambda: embeddings.load_vectors([path], WORDS, progress=False))
    if vectors is not None:
        assert vectors.shape[0] == len(WORDS)
        assert vectors.shape[1] <= embeddings.MOST_NUMBERS
        assert not abs(vectors[vectors == vectors]).max(initial=0) > embeddings.MOST_VALUE


def check_json(path: Path) -> None:
    """Accepted is what the standard library reads alike, and what can be written again."""
    content = path.read_bytes()
    value, complaint = refused(lambda: read_json(path))
    line, line_complaint = refused(lambda: parse_json(content, "line 1"))
    if b'"checksum"' not in content:
        assert bool(complaint) == bool(line_complaint)
    if not line_complaint:
        assert same(line, json.loads(content.decode("utf-8-sig")))
        assert depth(line) <= DEEPEST
        json.dumps(line, ensure_ascii=False, allow_nan=False).encode()
    if not complaint:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def same(one: Any, other: Any) -> bool:
    """Equality, in which 1, 1.0 and True differ."""
    return repr(one) == repr(other)


def depth(value: Any) -> int:
    """Lists and objects inside one another."""
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


def _zip(text: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("glove.txt", text)
    return content.getvalue()


def _npz() -> bytes:
    import numpy as np

    content = io.BytesIO()
    np.savez(content, words=np.array(["dog", "cat"]), vectors=np.ones((2, 3), np.float32))
    return content.getvalue()


TARGETS: dict[str, tuple[Callable[[Path], None], str, Callable[[], Iterable[bytes]]]] = {
    "corpus-jsonl": (
        check_corpus,
        "train.jsonl",
        lambda: (json.dumps(RECORD, ensure_ascii=ascii).encode() + b"\n" for ascii in (True, False)),
    ),
    "corpus-csv": (check_corpus, "train.csv", lambda: [f"{HEADER}\n{ROWS}".encode()]),
    "vectors": (
        check_vectors,
        "glove.txt",
        lambda: [b"dog 1 2 -0.5\n. 3e2 4 0\nNew York 1 2 3\n", "naïve 1 2\nsad 3 4\n".encode()],
    ),
    "vectors-zip": (check_vectors, "glove.zip", lambda: [_zip("dog 1 2\n. 3 4\n")]),
    "vectors-npz": (check_vectors, "glove.npz", lambda: [_npz()]),
    "json": (
        check_json,
        "config.json",
        lambda: [
            json.dumps(
                {"model": {"dim": 12, "heads": [1, 2.5e3, None, True]}, "text": "é\u2028\\ud83d😢"}
            ).encode(),
            b'{"a": "\\ud83d\\ude22", "b": -1e-5,\n "checksum": "sha256:' + b"0" * 64 + b'"\n}\n',
        ],
    ),
}
"""By name: what must hold of a file, the file's name, and inputs to begin with."""

TOKENS = (
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\t",
        b"\\",
        b"\0",
        b"\x1b",
        b"\xef\xbb\xbf",
        b"\xed\xa0\xbd",
    ),
    *(b"NaN", b"Infinity", b"1e999", b"-0", b"nan", b"inf", b"\\ud83d", b"\\ude22", b"9" * 30, b"_comma_"),
    *(b"conv_id", b"emotion", b"situation", b"utterances", b"speaker", b"listener", b"text", b"5|5|5_2|2|5"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.fuzz",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--findings", type=Path, default=Path(), help="folder for inputs that break something"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the target on this input alone")
    arguments = parser.parse_args()
    check, name, seeds = TARGETS[arguments.target]
    # Files in memory: a disk would be the slowest part.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        path = Path(temporary) / name

        def one(data: bytes) -> None:
            path.write_bytes(data)
            check(path)

        if arguments.replay is not None:
            one(arguments.replay.read_bytes())
            return 0
        if atheris is None:
            parser.exit(2, "fuzz: atheris is not installed; pip install atheris\n")
        begin = Path(temporary) / "seeds"
        begin.mkdir()
        for number, seed in enumerate(seeds()):
            (begin / str(number)).write_bytes(seed)
        tokens = Path(temporary) / "tokens"
        hexadecimal = ("".join(f"\\x{byte:02x}" for byte in token) for token in TOKENS)
        tokens.write_text("".join(f'"{token}"\n' for token in hexadecimal))
        flags = [
            f"-max_total_time={math.ceil(60 * arguments.minutes)}",
            f"-artifact_prefix={arguments.findings}/{arguments.target}-",
            f"-dict={tokens}",
            *("-timeout=20", "-rss_limit_mb=4096", "-max_len=4096", "-print_final_stats=1"),
        ]
        atheris.Setup([sys.argv[0], *flags, str(begin)], one)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
