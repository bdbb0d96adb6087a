"""The server under load: answers a second and how long they take, at 1, 8 and 64 clients at once.

``python -m benchmarks.serving RUN [--seconds 10] [--soak 10000] [--out FILE.json]``

The server runs in a process of its own on this machine, with `ecore serve`'s defaults; the clients are in this one,
each with one connection, and ask again as soon as they have their answer. Contexts are the first turns of the sample
corpus that comes with the package. In the same run, in turn with the load, generation itself answers 64 of these
contexts at once and one at a time: its ratio is what batching can give here. ``--soak N`` then sends N requests, a
tenth of them broken, and compares the server's memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.command_line import parser_of
from ecore.demo import sample_corpus
from ecore.errors import InputError
from ecore.pipeline import ECore

CLIENTS = (1, 8, 64)
BROKEN = (b"{", b'{"messages": 1e999}', b'{"messages": [{"role": "user", "content": " "}]}')


def contexts() -> list[str]:
    """First turns of the sample corpus's test split."""
    lines = (sample_corpus() / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["utterances"][0]["text"] for line in lines]


class Client:
    """One connection that sends requests and reads their answers; small, for it shares the server's cores."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> int:
        """Return the status of the answer to a chat completion."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        await reader.readexactly(length)
        return int(lines[0].split()[1])

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()


async def load(port: int, clients: int, seconds: float, bodies: Sequence[bytes]) -> dict[str, Any]:
    """Ask with so many clients for so long; seconds of each answer, and answers a second."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def ask(number: int) -> None:
        client = Client(port)
        turn = number
        while time.perf_counter() < end:
            begin = time.perf_counter()
            status = await client.post(bodies[turn % len(bodies)])
            times.append(time.perf_counter() - begin)
            assert status == 200, status
            turn += clients
        await client.close()

    begin = time.perf_counter()
    await asyncio.gather(*(ask(number) for number in range(clients)))
    spent = time.perf_counter() - begin
    p50, p99 = np.percentile(times, (50, 99))
    return {"per_second": len(times) / spent, "p50": float(p50), "p99": float(p99), "requests": len(times)}


async def soak(port: int, requests: int, bodies: Sequence[bytes]) -> dict[str, Any]:
    """Send so many requests from 64 clients, a tenth of them broken; how many got which status."""
    statuses: dict[int, int] = {}
    left = iter(range(requests))

    async def ask() -> None:
        client = Client(port)
        for number in left:
            body = BROKEN[number % len(BROKEN)] if number % 10 == 0 else bodies[number % len(bodies)]
            status = await client.post(body)
            statuses[status] = statuses.get(status, 0) + 1
        await client.close()

    await asyncio.gather(*(ask() for _ in range(64)))
    return {str(status): count for status, count in sorted(statuses.items())}


def resident(process: int) -> float:
    """MiB of memory that a process has."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def generation(model: ECore, texts: Sequence[str], rows: int) -> float:
    """Answers a second of the model itself, ``rows`` contexts at once."""
    asked = [[text] for text in texts[:64]]
    begin = time.perf_counter()
    for i in range(0, len(asked), rows):
        model.respond(asked[i : i + rows])
    return len(asked) / (time.perf_counter() - begin)


def measure(run: Path, rounds: int, seconds: float, requests: int, threads: int) -> dict[str, Any]:
    """Start a server, measure, and end it."""
    texts = contexts()
    bodies = [json.dumps({"messages": [{"role": "user", "content": text}]}).encode() for text in texts]
    torch.set_num_threads(threads)
    model = ECore.from_pretrained(run)
    command = [sys.executable, "-m", "ecore", "serve", str(run), "--port", "0", "--threads", str(threads)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if "http://" not in line:
            raise InputError(f"{run}: the server did not start")
        port = int(line.split("http://")[1].split("/")[0].rpartition(":")[2])
        rows: dict[int, list[dict[str, Any]]] = {clients: [] for clients in CLIENTS}
        alone: dict[int, list[float]] = {1: [], 64: []}
        asyncio.run(load(port, 64, 2.0, bodies))  # warms up
        for _ in range(rounds):
            for clients in CLIENTS:
                rows[clients].append(asyncio.run(load(port, clients, seconds, bodies)))
            for at_once, rates in alone.items():
                rates.append(generation(model, texts, at_once))
        result: dict[str, Any] = {
            "clients": {
                str(clients): {
                    key: median(row[key] for row in measured)
                    for key in ("per_second", "p50", "p99", "requests")
                }
                for clients, measured in rows.items()
            },
            "generation_per_second": {str(at_once): median(rates) for at_once, rates in alone.items()},
            "threads": threads,
            "load_average": os.getloadavg()[0],
        }
        if requests:
            before = resident(server.pid)
            statuses = asyncio.run(soak(port, requests, bodies))
            result["soak"] = {"statuses": statuses, "mib_before": before, "mib_after": resident(server.pid)}
        return result
    finally:
        server.terminate()
        server.wait(60)


def report(result: dict[str, Any]) -> str:
    """Return the tables."""
    one = result["clients"]["1"]["per_second"]
    lines = ["clients   answers/s   of one client   p50 ms   p99 ms"]
    for clients, row in result["clients"].items():
        lines.append(
            f"{clients:>7} {row['per_second']:>11.1f} {row['per_second'] / one:>15.2f} {1000 * row['p50']:>8.0f} "
            f"{1000 * row['p99']:>8.0f}"
        )
    own = result["generation_per_second"]
    ratio, reached = own["64"] / own["1"], result["clients"]["64"]["per_second"] / one
    lines.append(
        f"generation itself: {own['1']:.1f} answers/s one by one, {own['64']:.1f} by 64, {ratio:.2f} times; the "
        f"server reaches {reached / ratio:.2f} of that"
    )
    if soaked := result.get("soak"):
        lines.append(
            f"soak: statuses {soaked['statuses']}; memory {soaked['mib_before']:.0f} MiB before, "
            f"{soaked['mib_after']:.0f} MiB after"
        )
    lines.append(f"{result['threads']} threads; load average of the machine {result['load_average']:.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write the file."""
    parser = parser_of("benchmarks.serving", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder made by `ecore train`")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="measurements of each (default: 3)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, metavar="X", help="of each load (default: 10)")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="then send N requests (default: 0)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    arguments = parser.parse_args(argv)
    try:
        result = measure(
            arguments.run, arguments.rounds, arguments.seconds, arguments.soak, arguments.threads
        )
    except InputError as error:
        parser.error(str(error))
    print(report(result))
    if arguments.out:
        harness.write_json(arguments.out, "serving", [result])


if __name__ == "__main__":
    main()
