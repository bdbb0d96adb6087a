"""Files are whole or not there."""

import errno
import gzip
import os
import shutil

import pytest

from ecore.errors import InputError
from ecore.files import (
    atomic_path,
    check_folder,
    expect_file,
    expect_folder,
    expect_new_folder,
    new_folder,
    numbered_lines,
    parse_json,
    read_json,
    seal_folder,
    write_json,
)


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
    "content, what", [(b"{\n\n 1: 2}", r"a.json:3: not valid JSON"), (b"\xff", "expected UTF-8")]
)
def test_what_cannot_be_read(tmp_path, content, what):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=what):
        read_json(tmp_path / "a.json")


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")


FOREIGN = {
    "deep": ("[" * 100_000, "nested deeper than 100"),
    "deep and whole": ("[" * 101 + "]" * 101, "nested deeper than 100"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested deeper than 100"),
    "long integer": ("9" * 5000, "a number of 5,000 digits; expected at most 100"),
    "long negative": ("-" + "9" * 101, "a number of 101 digits"),
    "NaN": ("NaN", r"not valid JSON \(NaN\)"),
    "Infinity": ("-Infinity", r"not valid JSON \(-Infinity\)"),
    "overflow": ("1e999", "expected a finite number"),
    "surrogate": ('"\\ud800"', "half a surrogate pair"),
    "surrogate in a key": ('{"\\uDFFF": 1}', "half a surrogate pair"),
    "UTF-8": (b'"\xff"', r"expected UTF-8 text, cannot be read \(invalid start byte\)"),
    "UTF-16": ('"a"'.encode("utf-16"), "expected UTF-8 text"),
    "encoded surrogate": (b'"\xed\xa0\x80"', "expected UTF-8 text"),
    "empty": ("", "not valid JSON"),
    "two values": ("1 2", "not valid JSON"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_json_is_one_line_with_its_place(tmp_path, name):
    content, why = FOREIGN[name]
    content = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(InputError, match=rf"^a reply: .*{why}") as error:
        parse_json(content, "a reply")
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)
    if name == "UTF-16":  # its byte order mark is on the first line
        return
    path = tmp_path / "a.json"
    # The token is also inside a string, a line before: that one is not to be named.
    token = content.decode("utf-8", "replace").replace("\\", "").replace('"', "")[:50].encode()
    path.write_bytes(b'["' + token + b'",\n\n' + content)
    with pytest.raises(InputError, match=rf"a\.json:3: .*({why}|not valid JSON)"):
        read_json(path)


@pytest.mark.parametrize(
    "text, value",
    [
        ('\ufeff{"é": 1}', {"é": 1}),
        ('"\\ud83d\\ude00"', "😀"),
        ('"\\\\ud800"', "\\ud800"),
        ("[" * 100 + "]" * 100, None),
        ('{"' + "[" * 500 + '": 99999999999999999999}', {"[" * 500: 10**20 - 1}),
        ("[-0.5, 1e308, null]", [-0.5, 1e308, None]),
    ],
)
def test_what_json_may_hold(text, value):
    for given in (text, text.encode()):
        found = parse_json(given, "a reply")
        assert value is None or found == value


def test_lines_of_a_text(tmp_path):
    content = "\ufeffone\u2028same\r\n\n \nfour é".encode()
    (tmp_path / "a.txt").write_bytes(content)
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(content)
    for name in ("a.txt", "a.txt.gz"):
        assert list(numbered_lines(tmp_path / name)) == [(1, "one\u2028same"), (4, "four é")]
    (tmp_path / "b.txt").write_bytes(b"one\n\n\xff\n")
    with pytest.raises(InputError, match=r"b\.txt:3: expected UTF-8"):
        list(numbered_lines(tmp_path / "b.txt"))
    (tmp_path / "c.gz").write_bytes(b"not packed")
    with pytest.raises(InputError, match=r"c\.gz: cannot be read"):
        list(numbered_lines(tmp_path / "c.gz"))


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "link").symlink_to("file.json")
    write_json(tmp_path / "link", 1)
    assert os.readlink(tmp_path / "link") == "file.json"
    assert read_json(tmp_path / "file.json") == 1


def test_errors_of_writing_name_the_file(tmp_path):
    def fail(number, name):
        with atomic_path(tmp_path / "a.bin") as temporary:
            raise OSError(number, "No space left", *([str(temporary)] if name else []))

    for number, name in ((errno.ENOSPC, True), (errno.ENOSPC, False)):
        with pytest.raises(OSError, match="No space left") as error:
            fail(number, name)
        assert error.value.filename == str(tmp_path / "a.bin")
    with pytest.raises(OSError, match="requested and 0 written") as error, atomic_path(tmp_path / "a.bin"):
        raise OSError("4096 requested and 0 written")  # as NumPy says it
    assert error.value.filename == str(tmp_path / "a.bin")
    with pytest.raises(OSError) as error, atomic_path(tmp_path / "a.bin"):
        os.stat("/nowhere/else")
    assert error.value.filename == "/nowhere/else"


@pytest.mark.parametrize("what", ["a folder", "a loop", "a pipe", "no folder around it"])
def test_what_can_be_no_file(tmp_path, what):
    path = tmp_path / "out"
    if what == "a folder":
        path.mkdir()
    elif what == "a loop":
        path.symlink_to("out")
    elif what == "a pipe":
        os.mkfifo(path)
    else:
        path = path / "deeper"
    with pytest.raises(InputError, match=rf"^{path}: "):
        expect_file(path)


def test_folders_are_tried_without_being_made(tmp_path):
    expect_folder(tmp_path / "new/deeper")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out: cannot be made a folder"):
        expect_folder(tmp_path / "file/out")
    assert os.listdir(tmp_path) == ["file"]


def test_new_folders(tmp_path, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to("out")
    for path in (out, tmp_path / "link"):  # first the link leads nowhere, then to an empty folder
        if path != out:
            out.mkdir()
        expect_new_folder(path)
        with new_folder(path) as folder:
            (folder / "a").touch()
        assert os.listdir(out) == ["a"]
        with pytest.raises(InputError, match="exists already"):
            expect_new_folder(path)
        shutil.rmtree(out)
    assert os.readlink(tmp_path / "link") == "out"

    def fill():
        with new_folder(out) as folder:
            (folder / "a").touch()
            raise OSError(errno.ENOSPC, "No space left", str(folder / "a"))

    with pytest.raises(OSError, match="No space left") as error:
        fill()
    assert error.value.filename == str(out / "a")
    assert os.listdir(tmp_path) == ["link"]
    out.mkdir()

    def refuse(source, target):  # as of mount points
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr("ecore.files.check_writable", lambda folder: None)
    with pytest.raises(InputError, match=r"out: cannot be replaced .Device or resource busy"):
        expect_new_folder(out)
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_sealed_folders(tmp_path):
    for name in ("a.json", "b.txt"):
        (tmp_path / name).write_text(name)
    check_folder(tmp_path)
    seal_folder(tmp_path)
    check_folder(tmp_path)
    (tmp_path / "b.txt").write_text("b.txu")
    with pytest.raises(InputError, match=r"b\.txt: damaged"):
        check_folder(tmp_path)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(InputError, match=r"b\.txt: no such file"):
        check_folder(tmp_path)


def test_one_byte_order_mark_is_no_part_of_a_text():
    for text in ("\ufeff[1]", b"\xef\xbb\xbf[1]"):
        assert parse_json(text, "x") == [1]
    for text in ("\ufeff\ufeff[1]", b"\xef\xbb\xbf\xef\xbb\xbf[1]"):
        with pytest.raises(InputError):
            parse_json(text, "x")
