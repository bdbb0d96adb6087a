"""No bit of a prepared folder can change unseen, and none of a preparation that died stays."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest

from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.errors import InputError
from ecore.files import new_folder
from ecore.paper.annotation.pipeline import read_conversations


@pytest.fixture
def folder(jsonl_folder, tmp_path):
    (tmp_path / "glove.txt").write_text("dog 1 2\n. 3 4\n")
    prepare(jsonl_folder, tmp_path / "out", glove=[tmp_path / "glove.txt"], progress=False)
    return tmp_path / "out"


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_is_seen(folder):
    picks, whole = random.Random(0), PreparedData.load(folder)
    for path in sorted(folder.iterdir()):
        content, bits = path.read_bytes(), 8 * path.stat().st_size
        for bit in {0, bits // 2, bits - 1, *(picks.randrange(bits) for _ in range(12))}:
            flip(path, bit)
            try:
                meta, complaint = PreparedData.load(folder).meta, ""
            except InputError as error:
                meta, complaint = {}, str(error)
            if complaint:
                assert re.fullmatch(rf"{folder}.*", complaint)
            else:  # the name of the checksum itself
                assert path.name == "meta.json"
                assert {**meta, **whole.meta} == meta
            path.write_bytes(content)
    PreparedData.load(folder)


def test_damage_is_seen_by_who_reads_conversations_alone(folder):
    path = folder / "test.texts.jsonl"
    path.write_bytes(path.read_bytes().replace(b"zebra", b"zebru"))
    with pytest.raises(InputError, match="its arrays or texts are not those that were prepared"):
        read_conversations(folder, "test")


def test_folders_without_checksums_and_with_files_of_others_load(folder):
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksum"]
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    (folder / ".DS_Store").write_text("left by a file manager")
    assert PreparedData.load(folder).meta == meta


def test_content_is_on_disk_before_the_folder_has_its_name(jsonl_folder, tmp_path, monkeypatch):
    synced, replaced = set(), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))

    def spied(source, target):
        if os.path.isdir(source):
            replaced.append({str(path) for path in source.iterdir()} | {str(source)})
            assert replaced[-1] <= synced
        replace(source, target)

    monkeypatch.setattr(os, "replace", spied)
    prepare(jsonl_folder, tmp_path / "out", progress=False)
    assert len(replaced) == 1
    assert len(replaced[0]) > 20


def test_what_dead_preparations_left_is_swept_and_what_lives_stays(jsonl_folder, tmp_path):
    dead, other = tmp_path / ".out.1.tmp", tmp_path / ".output.1.tmp"
    for left in (dead, other):
        left.mkdir()
        (left / "train.words.npy").write_text("half")
    with new_folder(tmp_path / "out") as living:
        assert not dead.exists()
        dead.mkdir()
        script = f"from pathlib import Path; from ecore.files import new_folder\n\
with new_folder(Path({str(tmp_path / 'out')!r})): pass"
        subprocess.run([sys.executable, "-c", script], check=True)
        assert living.exists()
        assert not dead.exists()
        shutil.rmtree(tmp_path / "out")
    assert other.exists()
