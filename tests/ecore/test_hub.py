"""Models on the hub: put there and loaded from there through huggingface_hub, against a server of the test's own."""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ecore import hub, pretrained
from ecore.errors import InputError
from ecore.pipeline import ECore
from tests import forked
from tests.ecore.generation.dialogues import CONTEXTS, differing_model

pytest.importorskip("huggingface_hub", reason="the hub needs the extra `hub`")
ROOT = Path(__file__).parents[2]
COMMIT = "a" * 40


class Handler(BaseHTTPRequestHandler):
    """As much of the hub as one model takes; its files are the server's ``files``."""

    protocol_version = "HTTP/1.1"

    def answer(self, value, status=200, **headers):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        sent = self.body()
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://127.0.0.1:{self.server.server_address[1]}/me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(sent)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"http://127.0.0.1:{self.server.server_address[1]}/me/model/commit/1",
                    "commitOid": COMMIT,
                }
            )
        else:
            self.answer({"error": "no such path"}, 404)

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/me/model/tree"):
            self.answer([self.entry(file) for file in self.server.files])
        elif path.startswith("/api/models/me/model"):
            siblings = [{"rfilename": file} for file in self.server.files]
            self.answer({"id": "me/model", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif "/resolve/" in path and name in self.server.files:
            content = self.server.files[name]
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def entry(self, file):
        content = self.server.files[file]
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def python(code, port, home, **environment):
    """A process whose hub is the server at ``port``; the client reads that when it is imported."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_TOKEN": "hf_token"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    done = forked.run(code, {**os.environ, "PYTHONPATH": paths, **settings, **environment}, home)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


ASK = f"from ecore import ECore\nprint(ECore.from_pretrained('me/model').respond({CONTEXTS[0]!r}, max_length=6))"


def test_there_and_back_and_offline(server, tmp_path):
    model = differing_model("soft").float()
    pretrained.save(model, tmp_path / "run")
    port = server.server_address[1]
    push = f"ECore.from_pretrained({str(tmp_path / 'run')!r}).push_to_hub('me/model')"
    address, answer = python(f"from ecore import ECore\nprint({push})\n{ASK}", port, tmp_path)
    assert address.endswith("me/model")
    assert answer == ECore(model).respond(CONTEXTS[0], max_length=6)
    assert set(server.files) == {
        "README.md",
        "config.json",
        "vocabulary.json",
        "checkpoints.json",
        "checkpoint-final.safetensors",
    }
    assert 'ECore.from_pretrained("me/model")' in server.files["README.md"].decode()
    # What is in the cache needs no network.
    server.files.clear()
    assert python(ASK, port, tmp_path, HF_HUB_OFFLINE="1") == [answer]
    refused = (
        "from ecore import ECore\ntry: ECore.from_pretrained('me/other')\nexcept ValueError as e: print(e)"
    )
    for offline in ("0", "1"):
        (line,) = python(refused, port, tmp_path, HF_HUB_OFFLINE=offline)
        assert line.startswith("me/other: no such folder, and not to be had from the Hugging Face hub (")


def test_a_path_is_never_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "download", lambda name: pytest.fail("the network"))
    monkeypatch.chdir(tmp_path)
    for folder in (Path("me/model"), str(tmp_path / "none"), "none", "./me/model", "me/model/more", "../me"):
        with pytest.raises(InputError, match="no such folder"):
            ECore.from_pretrained(folder)


def test_names():
    for wrong in ("model", "me/", "/model", "me/mo del", "me/model/x", "-me/model"):
        with pytest.raises(InputError, match=r"^push_to_hub: expected a repository's name as user/name"):
            hub.upload(Path(), wrong, private=False)


def test_a_card_has_what_the_run_knows(tmp_path):
    config = differing_model("hard").config
    assert "Not evaluated." in hub.card(config, None)
    (tmp_path / "evaluation-test").mkdir()
    (tmp_path / "evaluation-test/metrics.json").write_text(
        '{"ppl_per_sample": 31.02, "accuracy": 37.1, "samples": 3}'
    )
    (tmp_path / "config.json").write_text('{"data": {"vocabulary_size": 23616, "intensity": "vader"}}')
    card = hub.card(config, tmp_path)
    assert "| ppl_per_sample | 31.02 |" in card
    assert "| accuracy | 37.10 |" in card
    assert "23616 words" in card
    assert "samples" not in card
    assert "Strategy hard" in card
    assert card.startswith("---\nlibrary_name: ecore\n")
