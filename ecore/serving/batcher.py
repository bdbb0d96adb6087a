"""Requests batched as they come: a bounded queue, and a thread that answers what waits in it together."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from ecore.generation.decoding import Decoding
from ecore.generation.word_stream import WordStream
from ecore.pipeline import ECore, Perception, Reply
from ecore.serving.settings import Serving

if TYPE_CHECKING:
    from ecore.serving.metrics import Metrics

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """No more requests may wait; ``retry_after`` is the seconds after which there should be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The server is going down and takes nothing new."""


class Event(NamedTuple):
    """New words of an answer, and at its end the whole of it or what went wrong."""

    words: list[str]
    end: Reply | Perception | Exception | None


class Job:
    """A dialogue that waits for its answer; made and read on an event loop, answered on the batcher's thread.

    Args:
        turns: of the dialogue.
        decoding: how it is answered; None perceives its emotions alone.
        stream: give words as they come.

    Attributes:
        events: what the batcher has to say of it, in order; the last one has an ``end``.
        cancelled: nobody waits for it any more; it is dropped, also in the middle.
    """

    def __init__(self, turns: list[str], decoding: Decoding | None, stream: bool = False) -> None:
        self.turns, self.decoding, self.stream = turns, decoding, stream
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.cancelled = False
        self.arrived = time.monotonic()
        self.words: WordStream | None = None


class Batcher:
    """Answers jobs, those with the same decoding together.

    The oldest job waits ``settings.wait_ms`` for others; those that arrive while a batch is answered are the next one.

    Args:
        model: answers.
        settings: bounds.
        metrics: counts.
        loop: event loop of the jobs.
    """

    def __init__(
        self, model: ECore, settings: Serving, metrics: Metrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._model, self._settings, self._metrics, self._loop = model, settings, metrics, loop
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._batch_seconds = 0.0
        metrics.waiting.set_function(lambda: len(self._jobs))
        self._thread = threading.Thread(target=self._work, name="ecore batches", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: there is no room in it.
            Closed: :meth:`close` was called.
        """
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._jobs) >= self._settings.queue:
                self._drop_cancelled()
            if len(self._jobs) >= self._settings.queue:
                batches = math.ceil(len(self._jobs) / self._settings.batch_size)
                raise QueueFull(max(1, math.ceil(batches * self._batch_seconds)))
            self._jobs.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Answer what waits and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _drop_cancelled(self) -> None:
        kept = [job for job in self._jobs if not job.cancelled]
        self._metrics.cancelled.inc(len(self._jobs) - len(kept))
        self._jobs = deque(kept)

    def _alike(self) -> list[Job]:
        """The jobs that can be answered with the oldest one."""
        alike = [job for job in self._jobs if job.decoding == self._jobs[0].decoding]
        return alike[: self._settings.batch_size]

    def _next_batch(self) -> list[Job]:
        """Wait for jobs and take them out of the queue; none when it is closed and empty."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if not self._jobs:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                left = self._jobs[0].arrived + self._settings.wait_ms / 1000 - time.monotonic()
                jobs = self._alike()
                if left > 0 and len(jobs) < self._settings.batch_size and not self._closed:
                    self._changed.wait(left)
                    continue
                taken = set(map(id, jobs))
                self._jobs = deque(job for job in self._jobs if id(job) not in taken)
                return jobs

    def _work(self) -> None:
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        """Answer one batch; False when there is none any more."""
        jobs = self._next_batch()
        if not jobs:
            return False
        begin = time.monotonic()
        self._answer(jobs)
        self._batch_seconds = time.monotonic() - begin
        self._metrics.batch_seconds.observe(self._batch_seconds)
        self._metrics.batch_size.observe(len(jobs))
        return True

    def _answer(self, jobs: list[Job]) -> None:
        contexts, decoding = [job.turns for job in jobs], jobs[0].decoding
        for job in jobs:
            job.words = WordStream(self._model.model.vocabulary) if job.stream else None
        try:
            ends: list[Reply | Perception] = []
            if decoding is None:
                ends += self._model.perceive_contexts(contexts)
            else:
                ends += self._model.answer(contexts, decoding, self._watch(jobs))
        except Exception as error:
            self._fail(jobs, error)
            return
        events = []
        for job, end in zip(jobs, ends, strict=True):
            rest: list[str] = []
            if isinstance(end, Reply):
                rest = [] if job.words is None else job.words.rest(end)
                self._metrics.words.inc(end.length)
            events.append((job, Event(rest, end)))
        self._metrics.cancelled.inc(sum(job.cancelled for job in jobs))
        self._deliver(events)

    def _watch(self, jobs: list[Job]) -> Callable[[list[int], list[int]], Collection[int]]:
        def watch(rows: list[int], ids: list[int]) -> list[int]:
            events = []
            for row, word in zip(rows, ids, strict=False):  # beam search has no words before its end
                stream = jobs[row].words
                if stream is not None and (words := stream.add(word)):
                    events.append((jobs[row], Event(words, None)))
            if events:
                self._deliver(events)
            return [row for row in rows if jobs[row].cancelled]

        return watch

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        """Answer each job alone, so that one of them spoils no other; what was in words already has ended."""
        fresh = [job for job in jobs if job.words is None or not job.words.begun]
        ended = [job for job in jobs if job not in fresh] if len(jobs) > 1 else jobs
        _log.error("a batch of %d failed: %s: %s", len(jobs), type(error).__name__, error)
        self._deliver([(job, Event([], error)) for job in ended])
        if len(jobs) > 1:
            for job in fresh:
                self._answer([job])

    def _deliver(self, events: list[tuple[Job, Event]]) -> None:
        def put() -> None:
            for job, event in events:
                job.events.put_nowait(event)

        self._loop.call_soon_threadsafe(put)
