"""The command `ecore annotate`, from a corpus to labels."""

import json

import pytest

from ecore.data.prepare import prepare
from ecore.errors import InputError
from ecore.evaluation.multi_emotion import read_multi_emotion
from ecore.paper.annotation.pipeline import read_conversations, run
from tests.ecore.paper.annotation.commands import command, edit
from tests.ecore.paper.annotation.dialogues import EMOTIONS, FOUR, SAID, Says, labels_file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotate") / "corpus"
    folder.mkdir()
    said = {
        "sad": ("I was sad and afraid.", "Be grateful."),
        "joyful": ("We won, so joyful!", "You must be grateful."),
        "afraid": ("A noise.", "Oh."),
        "grateful": ("Thanks.",),
    }
    for split in ("train", "valid", "test"):
        records = [
            {
                "conv_id": f"{split}-{emotion}",
                "emotion": emotion,
                "situation": "S.",
                "utterances": [
                    {"speaker": ("speaker", "listener")[i % 2], "text": x} for i, x in enumerate(turns)
                ],
            }
            for emotion, turns in said.items()
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_the_whole_way(corpus, tmp_path, capsys):
    out, multi = tmp_path / "out", tmp_path / "multi.jsonl"
    assert command("run", "--data", corpus, "--annotator", "lexicon", "--out", out) == 0
    assert "the true one among them            2" in capsys.readouterr().out
    sheet = out / "review.csv"
    copy = tmp_path / "other.csv"
    copy.write_bytes(sheet.read_bytes())
    edit(sheet, "sad,afraid,", "sad,afraid,x")
    assert command("review", out, "--out", multi) == 0
    assert read_multi_emotion(multi) == {
        "test-sad": ("sad", "grateful"),
        "test-joyful": ("joyful", "grateful"),
    }
    assert "1 of 3 labels struck" in capsys.readouterr().out
    assert command("review", out, "--sheet", sheet, copy, "--out", multi) == 0
    assert "Krippendorff's alpha 0.000" in capsys.readouterr().out
    again = tmp_path / "again"
    files = [out / "annotations.jsonl", multi]
    assert command("run", "--data", corpus, "--annotator", "file", "--labels", *files, "--out", again) == 0
    assert "1 dialogues without an annotation, test-afraid first" in capsys.readouterr().out
    assert command("agreement", *files) == 0
    assert "        2" in capsys.readouterr().out


def test_a_prepared_folder_gives_the_same_conversations(corpus, tmp_path):
    prepare(corpus, tmp_path / "prepared", progress=False)
    assert read_conversations(tmp_path / "prepared", "test") == read_conversations(corpus, "test")
    conversations, emotions = read_conversations(corpus, "valid")
    assert emotions == EMOTIONS
    assert [c.conv_id for c in conversations] == ["valid-sad", "valid-joyful", "valid-afraid"]
    texts = tmp_path / "prepared" / "test.texts.jsonl"
    texts.write_text(texts.read_text() + texts.read_text())
    with pytest.raises(
        InputError, match=r"prepared: damaged: its arrays or texts are not those that were prepared"
    ):
        read_conversations(tmp_path / "prepared", "test")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--annotator", "endpoint", "--model", "m"], "--url: is needed for --annotator endpoint"),
        (["--annotator", "file"], "--labels: is needed for --annotator file"),
        (["--annotator", "lexicon", "--url", "http://x"], "--url: goes with --annotator endpoint"),
        (["--annotator", "lexicon", "--limit", "0"], "--limit"),
    ],
)
def test_flags_that_do_not_fit(corpus, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        command("run", "--data", corpus, "--out", tmp_path / "o", *flags)


def test_the_same_file_twice(tmp_path):
    path = labels_file(tmp_path / "1", a=["sad"])
    with pytest.raises(InputError, match="the same file twice"):
        command("agreement", path, path)


def test_all_struck_is_no_subset(tmp_path):
    run(FOUR, Says(**SAID), tmp_path, progress=False)
    text = (tmp_path / "review.csv").read_text(encoding="utf-8-sig")
    (tmp_path / "review.csv").write_text(text.replace(",\n", ",x\n").replace(",\r\n", ",x\r\n"))
    with pytest.raises(InputError, match="every label was struck"):
        command("review", tmp_path, "--out", tmp_path / "multi.jsonl")
    assert not (tmp_path / "multi.jsonl").exists()
