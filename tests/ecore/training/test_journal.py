"""A run's log: what a crash tore is cut off, any other damage is refused, and nothing is lost."""

import json

import pytest

from ecore.errors import InputError
from ecore.training.journal import METRICS, MetricsLog, read_metrics

LINES = [{"step": step, "loss": 10 / step, "health_relevant": None} for step in range(1, 6)]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "lo', b'{"step": 6, "loss": 1.', b"\0\0\0"])
def test_a_torn_last_line_is_cut(log, torn):
    before = log.read_bytes()
    log.write_bytes(before + torn)
    assert read_metrics(log.parent) == LINES
    MetricsLog(log.parent, 5).close()
    assert log.read_bytes() == before
    MetricsLog(log.parent, 3).close()
    assert log.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])


DAMAGE = {
    "first byte": (lambda b: b"\xfb" + b[1:], ":1: expected UTF-8"),
    "a byte of JSON": (lambda b: b.replace(b'"step": 3,', b'"step": 3.'), ":3: not valid JSON"),
    "a number": (lambda b: b.replace(b'"step": 3', b'"step": NaN'), ":3: not valid JSON .NaN."),
    "a name": (lambda b: b.replace(b'"step": 3', b'"stez": 3'), ":3: not a line of a run's log"),
    "a type": (lambda b: b.replace(b"null", b'"no"', 1), ":1: health_relevant: expected a number, got 'no'"),
    "a list": (lambda b: b"[1]\n" + b, ":1: not a line of a run's log"),
    "a line's end": (lambda b: b.replace(b"}\n", b"} ", 1), ":1: not valid JSON"),
    "the last line's end": (lambda b: b[:-1] + b"\x0b", ":5: not valid JSON"),
    "depth": (lambda b: b"[" * 10**5 + b"\n" + b, ":1: not valid JSON .nested"),
    "a blank line": (lambda b: b"\n" + b, ":1: not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_other_damage_is_refused_and_the_log_stays(log, name):
    damage, complaint = DAMAGE[name]
    log.write_bytes(damage(log.read_bytes()))
    before = log.read_bytes()
    for use in (lambda: read_metrics(log.parent), lambda: MetricsLog(log.parent, 5)):
        with pytest.raises(InputError, match=rf"metrics\.jsonl{complaint}"):
            use()
    assert log.read_bytes() == before


def test_a_changed_digit_is_seen(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for line in LINES:
        log.write(line)
    log.close()
    path = tmp_path / METRICS
    whole = path.read_bytes()
    assert read_metrics(tmp_path) == LINES
    assert [
        {**line, **json.loads(text)} == json.loads(text)
        for line, text in zip(LINES, whole.splitlines(), strict=True)
    ]
    path.write_bytes(whole.replace(b'"loss": 5.0', b'"loss": 4.0'))
    for use in (lambda: read_metrics(tmp_path), lambda: MetricsLog(tmp_path, 5)):
        with pytest.raises(InputError, match=r"metrics\.jsonl:2: damaged: the line does not fit its crc32"):
            use()
    path.write_bytes(path.read_bytes().replace(b', "crc32"', b', "crc"'))  # no line of ours: as in older logs
    assert read_metrics(tmp_path)[1]["loss"] == 4.0
