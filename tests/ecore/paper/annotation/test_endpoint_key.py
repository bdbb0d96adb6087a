"""The endpoint's key: where it comes from, and that nothing prints, keeps or forwards it."""

import argparse
import json

import pytest

from ecore.cli.annotate import declare_annotate, run_annotate
from ecore.errors import InputError
from ecore.paper.annotation.endpoint import EndpointAnnotator
from ecore.paper.annotation.pipeline import annotate
from tests.ecore.paper.annotation.dialogues import EMOTIONS, conversation
from tests.ecore.paper.annotation.stub import asking, reply

SECRET = "sk-Very-Secret-1"


LEAKS = {
    "refusal": (401, {}, f"no such key {SECRET}"),
    "in another case": (401, {}, f"no such key {SECRET.upper()}"),
    "parted by controls": (401, {}, "\x1b[2J" + SECRET[:5] + "\0\x07" + SECRET[5:]),
    "this dialogue's refusal": (400, {}, f"bad {SECRET}"),
    "error": (500, {}, SECRET),
    "redirect": (302, {"Location": f"/{SECRET}"}, SECRET),
    "reason": lambda handler, _: (
        handler.wfile.write(f"HTTP/1.1 403 {SECRET} \x1b[31m\r\n\r\n".encode()) and None
    ),
    "status line": lambda handler, _: handler.wfile.write(f"{SECRET}\r\n\r\n".encode()) and None,
    "answer": reply(f'I got {SECRET} ["sad"]'),
    "malformed answer": reply(f"I got {SECRET}\x1b[2J"),
    "escaped": (
        200,
        {},
        json.dumps(json.loads(reply("I got KEY")[2])).replace("KEY", "\\u0073" + SECRET[1:]),
    ),
    "no completion": (200, {}, json.dumps({SECRET: SECRET})),
    "no JSON": (200, {}, SECRET),
}


@pytest.mark.parametrize("name", LEAKS)
def test_the_key_is_never_printed_or_kept(stub, tmp_path, name):
    stub.answers = [LEAKS[name]]
    said = ""
    try:
        annotated, problems = annotate([conversation()], asking(stub, tmp_path, key=SECRET), progress=False)
        said = f"{annotated} {problems}"
    except InputError as error:
        said = str(error)
    cache = tmp_path / "answers.jsonl"
    said += cache.read_text() if cache.exists() else ""
    assert SECRET[5:].lower() not in said.lower()
    assert "\x1b" not in said
    assert "\0" not in said


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pass@host/v1", "http://user@host/v1", "http://:pass@host", "http://user:pass@[host/v1", "ftp://h/v1",
        "http:///v1", "http://h:99999/v1", "http://h:x/v1", "http://h/v1?key=1", "http://h/v1#a", "http://h /v1",
        "http://h/\n", "http://h/\x1b[2J", "http://[::1/v1",
    ],
)  # fmt: skip
def test_addresses_that_are_refused(tmp_path, url):
    with pytest.raises(InputError, match=r"^--url: expected ") as error:
        EndpointAnnotator(url, "m", EMOTIONS, tmp_path / "answers.jsonl")
    assert "pass" not in str(error.value).replace("password", "")
    assert str(error.value).isprintable()


def test_a_redirect_is_not_followed(stub, tmp_path):
    stub.answers = [(302, {"Location": "/elsewhere"}, "")]
    with pytest.raises(InputError, match="refused with 302"):
        asking(stub, tmp_path, key="k3y").annotate(conversation())
    assert [method for method, *_ in stub.requests] == ["POST"]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "", "http://"])
def test_urls_and_keys_that_cannot_be(tmp_path, url):
    with pytest.raises(InputError, match="--url: expected the address"):
        EndpointAnnotator(url, "m", EMOTIONS, tmp_path / "a")
    with pytest.raises(InputError, match="API key"):
        EndpointAnnotator("http://x/v1", "m", EMOTIONS, tmp_path / "a", key="a\nb")


def test_the_key_comes_from_the_environment(tmp_path, stub, monkeypatch, capsys):
    for split in ("train", "valid", "test"):
        records = [
            {
                "conv_id": str(i),
                "emotion": "sad",
                "situation": "S.",
                "utterances": [
                    {"speaker": "speaker", "text": f"{i}"},
                    {"speaker": "listener", "text": "Yes."},
                ],
            }
            for i in range(3)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setenv("OPENAI_API_KEY", "k3y")
    stub.answers = [reply('["sad", "gloomy"]'), (400, {}, "filtered")]
    parser = argparse.ArgumentParser()
    declare_annotate(parser)
    flags = f"run --data {tmp_path} --limit 2 --annotator endpoint --url {stub.url} --model m --jobs 1"
    assert run_annotate(parser.parse_args([*flags.split(), "--out", str(tmp_path / "out")])) == 0
    assert [headers["Authorization"] for *_, headers in stub.requests] == ["Bearer k3y"] * 2
    printed = capsys.readouterr().out
    assert "1 names in the answers are no known emotion" in printed
    assert "1 dialogues without an annotation, 1 first: refused with 400: filtered" in printed
    assert "the same command requests them again" in printed
