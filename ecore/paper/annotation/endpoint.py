"""A language model as annotator, behind any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ecore.data.corpus import Conversation
from ecore.errors import InputError
from ecore.files import parse_json, read_bytes
from ecore.paper.annotation.annotators import NoAnnotation

TIMEOUT = 120.0
"""Seconds that one request may take."""
ATTEMPTS = 6
"""Requests for one conversation before giving up on a server that is busy or broken."""
BUSY = (408, 409, 425, 429)
"""Statuses under 500 after which the same request is sent again."""
ANSWERS = 3
"""Answers that are read for one conversation before it counts as malformed."""
REFUSALS = 5
"""Dialogues refused before anything was answered, after which the request itself must be wrong."""
LONGEST_REPLY = 4 << 20
"""Bytes of one reply: an answer is a short list."""
KEY = "OPENAI_API_KEY"
"""Environment variable that the key comes from."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0
"""Seconds before the second request (doubling from there) and at most, whatever the server requests."""

_INSTRUCTION = """You label the emotions of dialogues. You read one dialogue between a speaker, who tells of an \
experience, and a listener. Name every emotion that the dialogue expresses, the speaker's main emotion first, then \
the others, the strongest first; as few as do it justice, usually one to four. Use only these emotions: {emotions}.
Answer with nothing but a JSON list of their names, like ["{first}", "{second}"]."""

_ESCAPES = re.compile(
    r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.DOTALL
)
_LIST = re.compile(r"\[[^\[\]]*\]")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key to another address and lose its body."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_connecting = threading.local()
"""``sockets``: where a thread's connections note theirs, for the code that may have to cut them."""


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _connecting.sockets.append(self.sock)


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _connecting.sockets.append(self.sock)


class _WatchedHTTP(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _WatchedHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


class EndpointAnnotator:
    """An annotator that asks a language model at ``URL/chat/completions``, temperature 0.

    Each answer is kept in ``cache`` as it comes, so that an interrupted annotation, started again, asks only for
    what is missing; an answer counts for the same model, instruction and dialogue alone. A busy or broken
    server (429 and the like, 5xx, no connection, no answer in time) is asked again, after a wait that
    doubles or the one that it asks for. May be called from several threads.

    Args:
        url: the base address, up to ``/v1``.
        model: the model's name there.
        emotions: the emotions to choose from.
        cache: JSON lines of answers, made where it is missing.
        key: sent as bearer token; None sends none, as servers on one's own machine want it.
        stopped: once set, no more requests are sent and all waits end (NoAnnotation).

    Raises:
        InputError: a URL that is none, or a cache that cannot be read.
    """

    name = "endpoint"

    def __init__(
        self,
        url: str,
        model: str,
        emotions: Sequence[str],
        cache: Path,
        key: str | None = None,
        stopped: threading.Event | None = None,
        timeout: float = TIMEOUT,
        first_wait: float = FIRST_WAIT,
    ) -> None:
        _check_url(url)
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise InputError("API key: expected printable ASCII characters in one line")
        self._url = url.rstrip("/") + "/chat/completions"
        self._model, self._key = model, key
        self._timeout, self._first_wait = timeout, first_wait
        self._emotions = {emotion.casefold(): emotion for emotion in emotions}
        examples = {"first": emotions[0], "second": emotions[-1]}
        self._instruction = _INSTRUCTION.format(emotions=", ".join(emotions), **examples)
        self._opener = urllib.request.build_opener(_NoRedirect, _WatchedHTTP, _WatchedHTTPS)
        self._secrets = [key] if key else []
        self._cache = cache
        self._lock = threading.Lock()
        self._stopped = stopped or threading.Event()
        self._answers = self._read_cache()
        self._refusals = 0
        self.unknown_names = 0
        """Names in the answers used that are no known emotion; they are left out."""

    def annotate(self, conversation: Conversation) -> tuple[str, ...]:
        """See :class:`~ecore.paper.annotation.annotators.Annotator`.

        Raises:
            NoAnnotation: no answer was a list of known emotions, or the server refused this dialogue.
            InputError: the server refuses every request (address, key, model), or stays busy or broken; what it
                answered so far is kept.
        """
        body = self._body(conversation.turns)
        key = hashlib.sha256(body).hexdigest()
        with self._lock:
            kept = self._answers.get(key)
        for _ in range(ANSWERS):
            text = self._ask(body) if kept is None else kept
            known = self._named(text)
            if known is not None:
                with self._lock:
                    self.unknown_names += known.count(None)
                if kept is None:
                    self._keep(key, conversation.conv_id, text)
                return tuple(dict.fromkeys(name for name in known if name is not None))
        raise NoAnnotation(f"malformed answer: {self._clean(text)[:60]!r}")

    def _named(self, text: str) -> list[str | None] | None:
        """The emotions that an answer names, None for each unknown one; None where it is no answer.

        The last list counts, for before it a model may think aloud. Where it is empty and another comes before it, it
        may be an afterthought ("others: []") or a change of mind: that is no answer.
        """
        lists = [[self._emotions.get(name.strip().casefold()) for name in found] for found in _lists(text)]
        if not lists or (not any(lists[-1]) and any(map(any, lists))) or (lists[-1] and not any(lists[-1])):
            return None
        return lists[-1]

    def _body(self, turns: Sequence[str]) -> bytes:
        said = "\n".join(f"{('Speaker', 'Listener')[i % 2]}: {turn}" for i, turn in enumerate(turns))
        messages = [{"role": "system", "content": self._instruction}, {"role": "user", "content": said}]
        return json.dumps({"model": self._model, "messages": messages, "temperature": 0}).encode()

    def _ask(self, body: bytes) -> str:
        """The text of one answer; "" where the server's message has none."""
        headers = {"Content-Type": "application/json", "User-Agent": "ecore-annotate"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        problem = ""
        for attempt in range(ATTEMPTS):
            if self._stopped.is_set():
                raise NoAnnotation("stopped")
            wait = self._first_wait * 2**attempt * random.uniform(0.75, 1.25)
            request = urllib.request.Request(self._url, body, headers)
            try:
                return self._without_key(_answer_text(self._reply(request)))
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}"
                with error:
                    if error.code not in BUSY and error.code < 500:
                        self._refused(error)
                    wait = _asked_wait(error.headers.get("Retry-After")) or wait
            except OSError as error:  # URLError, a reset connection, a timeout
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except (http.client.HTTPException, ValueError) as error:
                problem = f"broken answer ({error})"
            if attempt + 1 < ATTEMPTS:
                self._stopped.wait(min(wait, LONGEST_WAIT))
        raise InputError(
            f"{self._url}: {self._clean(problem)[:200]}, {ATTEMPTS} times in a row; expected answers. What was "
            "answered is kept: start the same command again to go on"
        )

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        """A refusal of this dialogue (too long, filtered), or of everything."""
        body = b""
        with contextlib.suppress(OSError, http.client.HTTPException):  # the explanation may break off
            body = error.read(2000)
        said = self._clean(body.decode("utf-8", "replace"))[:200]
        if error.code in (400, 413, 422):
            with self._lock:
                self._refusals += 1
                wrong = not self._answers and self._refusals >= REFUSALS
            if not wrong:
                raise NoAnnotation(f"refused with {error.code}: {said[:60]}")
        check = {401: "the key", 403: "the key", 404: "--url and --model"}.get(error.code, "--url, --model")
        raise InputError(
            f"{self._url}: refused with {error.code} {self._clean(error.reason)[:60]}; check {check}; it says: "
            f"{said or 'nothing'}"
        )

    def _reply(self, request: urllib.request.Request) -> bytes:
        """Send a request and read the reply, in ``timeout`` seconds together.

        Raises:
            TimeoutError: a server that sends a byte now and then.
            ValueError: more than :data:`LONGEST_REPLY` bytes.
        """
        late = threading.Event()
        sockets: list[socket.socket] = []
        _connecting.sockets = sockets

        def cut() -> None:
            late.set()
            for connected in sockets:
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self._timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content: bytes = response.read(LONGEST_REPLY + 1)
        except (OSError, http.client.HTTPException):
            if late.is_set():
                raise TimeoutError(f"no whole reply in {self._timeout:g} seconds") from None
            raise
        finally:
            timer.cancel()
        if len(content) > LONGEST_REPLY:
            raise ValueError(f"over {LONGEST_REPLY:,} bytes")
        return content

    def _clean(self, text: str) -> str:
        """Return what somebody else wrote as one line without control characters and without the key."""
        return self._without_key(" ".join("".join(c for c in text if c.isprintable() or c.isspace()).split()))

    def _without_key(self, text: str) -> str:
        # A server may send back what it was sent, perhaps in another case.
        for secret in self._secrets:
            text = re.sub(re.escape(secret), "[key]", text, flags=re.IGNORECASE)
        return text

    def _read_cache(self) -> dict[str, str]:
        """Answers by key. A last line that an interruption tore is cut off, so that what follows starts afresh."""
        answers: dict[str, str] = {}
        if not self._cache.is_file():
            return answers
        content = read_bytes(self._cache)
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            where = f"{self._cache}:{number}"
            record = parse_json(line, where)
            key, answer = (
                (record.get("key"), record.get("answer")) if isinstance(record, dict) else (None, None)
            )
            if not isinstance(key, str) or not isinstance(answer, str):
                raise InputError(
                    f"{where}: not an answer that was kept; expected key, conv_id and answer; remove the line"
                )
            answers[key] = answer
        if len(whole) < len(content):
            with open(self._cache, "r+b") as file:
                file.truncate(len(whole))
        return answers

    def _keep(self, key: str, conv_id: str, answer: str) -> None:
        line = json.dumps({"key": key, "conv_id": conv_id, "answer": answer})
        with self._lock:
            self._answers[key] = answer
            with open(self._cache, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        secret = "@" in parts.netloc
        plain = (
            not parts.query and not parts.fragment and url.isascii() and url.isprintable() and " " not in url
        )
    except ValueError:
        usable, plain, secret = False, False, "@" in url
    if secret:  # it would be printed and kept with the address
        raise InputError(
            f"--url: expected no user or password in it; give the key in the environment variable {KEY}"
        )
    if not usable or not plain:
        raise InputError(
            f"--url: expected the address of an API like http://localhost:8000/v1, got {url[:100]!r}"
        )


def _answer_text(content: bytes) -> str:
    """The message's text of a chat completion.

    Raises:
        ValueError: not JSON, or no chat completion.
    """
    # What a model writes may break off between the halves of a surrogate pair.
    reply = parse_json(_ESCAPES.sub(_whole, content.decode("utf-8", "replace")), "the reply")
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("no choices[0].message.content") from None
    if not isinstance(text, str | None):
        raise ValueError("choices[0].message.content is no text")
    return text or ""


def _whole(escape: re.Match[str]) -> str:
    return r"\ufffd" if escape["half"] else escape[0]


def _lists(text: str) -> Iterator[list[str]]:
    """The JSON lists of texts in ``text``."""
    for found in _LIST.findall(text):
        try:
            names = parse_json(found, "the list")
        except InputError:
            continue
        if all(isinstance(name, str) for name in names):
            yield names


def _asked_wait(header: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
