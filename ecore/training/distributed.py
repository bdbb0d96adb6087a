"""The processes that train one model together: this one's rank, and the messages between them.

Every process has the whole data and takes its rows of each batch; gradients are averaged by
``DistributedDataParallel``. Small agreements (stop? how did validation go?) travel over gloo on the host, so that
they never make a GPU wait.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ecore.errors import InputError

BEAT, SILENT = 4.0, 40.0
"""Seconds between a process's signs of life, and without any after which it counts as gone."""
_AGAIN = "the last checkpoint is kept: start all of them again with --resume"


class Parted(RuntimeError):
    """Another process of the training is gone; the message says what to do."""


@dataclass(frozen=True)
class Processes:
    """This process among those of one training; the default is alone."""

    rank: int = 0
    count: int = 1
    host_group: Any = None
    """The gloo group for agreements; None where this process is alone."""

    @property
    def first(self) -> bool:
        """True in the process that writes files and prints."""
        return self.rank == 0

    def any(self, value: bool) -> bool:
        """Return True if ``value`` is true in any process."""
        if self.count == 1:
            return value
        flag = torch.tensor([int(value)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.host_group)
        return bool(flag.item())

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank, in every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the processes; on a GPU over its own links."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier(group=self.host_group)


def launched() -> bool:
    """Return True if ``torchrun`` started this process, with others or alone."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(device: str) -> tuple[Processes, torch.device]:
    """Join the processes that ``torchrun`` started, and take this one's device.

    Args:
        device: "cpu", or "cuda": GPU number ``LOCAL_RANK``.

    Raises:
        InputError: this machine has fewer GPUs than processes.
    """
    mine = torch.device(device)
    if mine.type == "cuda":
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
            raise InputError(
                f"--nproc-per-node: expected at most {torch.cuda.device_count()}, one process for each GPU"
            )
        mine = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if mine.type == "cuda" else "gloo")
    group = dist.new_group(backend="gloo") if mine.type == "cuda" else dist.group.WORLD
    processes = Processes(dist.get_rank(), dist.get_world_size(), group)
    if processes.count > 1:
        global _watcher
        _watcher = threading.Thread(target=_watch, args=(processes,), daemon=True)
        _watcher.start()
    return processes, mine


@contextmanager
def parted() -> Iterator[None]:
    """Make one kind of what torch raises where another process is gone.

    Raises:
        Parted: it is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise Parted(f"another process of this training has ended; {_AGAIN}") from None
        raise


_left = threading.Event()
_watcher: threading.Thread | None = None


def _watch(processes: Processes) -> None:
    """End this process where another gives no sign of life: one on a host without power or network closes nothing.

    Signs are counts in the store of ``torchrun``.
    """
    seen = dict.fromkeys(range(processes.count), (b"", time.monotonic()))
    store, beats = None, 0
    while not _left.wait(BEAT):
        beats += 1
        try:
            if store is None:
                address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                store = dist.TCPStore(address, port, timeout=timedelta(seconds=BEAT), wait_for_workers=False)
            store.set(_sign(processes.rank), str(beats))
            for rank, (sign, _) in seen.items():
                found = store.get(_sign(rank)) if store.check([_sign(rank)]) else b""
                if found != sign:
                    seen[rank] = found, time.monotonic()
        except RuntimeError:  # the store's host may be the one that is gone
            store = None
        gone = [rank for rank, (_, since) in seen.items() if time.monotonic() - since > SILENT]
        if gone and not _left.is_set():
            which = min(gone) if len(gone) < processes.count else "0, or the network,"
            words = f"no sign of life of process {which} in {SILENT:.0f} seconds; {_AGAIN}"
            os.write(2, f"\necore: error: {words}\n".encode())
            os._exit(1)


def _sign(rank: int) -> str:
    return f"ecore/sign-of-life/{rank}"


def leave() -> None:
    """Part from the others; nothing where this process is alone."""
    _left.set()
    if _watcher is not None:
        # A thread that is still inside the store when Python ends takes the process down or keeps it from ending.
        _watcher.join(timeout=3 * BEAT)
    if dist.is_initialized():
        dist.destroy_process_group()
