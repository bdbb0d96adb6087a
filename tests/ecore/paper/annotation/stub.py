"""A server that gives the answers of a test, and an annotator that asks it."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ecore.paper.annotation.endpoint import EndpointAnnotator
from tests.ecore.paper.annotation.dialogues import EMOTIONS


def reply(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]})


class Stub:
    """A server that gives its answers in turn, the last one for ever, and keeps what it was asked.

    An answer is (status, headers, body), or a function that makes one from the handler and the request, or None
    where it has done what there is to do.
    """

    def __init__(self):
        self.answers, self.requests, self.times = [reply('["sad"]')], [], []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                stub.requests.append(("GET", self.path, None, dict(self.headers)))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(("POST", self.path, body, dict(self.headers)))
                stub.times.append(time.monotonic())
                answer = stub.answers.pop(0) if len(stub.answers) > 1 else stub.answers[0]
                if callable(answer):
                    answer = answer(self, body)
                if answer is None:
                    return
                status, headers, text = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def asking(stub, folder, **options):
    options = {"model": "m", "first_wait": 0.001, **options}
    return EndpointAnnotator(stub.url, emotions=EMOTIONS, cache=folder / "answers.jsonl", **options)
