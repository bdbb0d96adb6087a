"""Files are whole or not there."""

import os

import pytest

from ecore.errors import InputError
from ecore.files import atomic_path, read_json, write_json


def test_json_comes_back(tmp_path):
    value = {"é": [1, 0.1, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert os.listdir(tmp_path) == ["a.json"]


def test_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_json(tmp_path / "a.json", 1)
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize(
    "content, what", [(b"{\n\n 1: 2}", r"a.json:3: not valid JSON"), (b"\xff", "cannot be read")]
)
def test_what_cannot_be_read(tmp_path, content, what):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=what):
        read_json(tmp_path / "a.json")


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
