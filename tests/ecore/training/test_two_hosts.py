"""Two hosts train as one process does; one that is killed ends the other, and the run goes on.

The hosts are two network namespaces with a cable between them; a torchrun agent in each.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ecore.training.journal import read_metrics
from tests.ecore.training.processes import ROOT, compare, in_turn, python_path, resume, train

pytestmark = pytest.mark.slow
WITHIN = 30.0
"""Seconds after one host's death in which the other has to end."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces, 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("making network namespaces needs the command ip and root")
    names = [f"ecore-{uuid.uuid4().hex[:6]}" for _ in range(2)]
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip(
                "link",
                "add",
                "ecore0",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "ecore0",
                "netns",
                names[1],
            )
            for number, name in enumerate(names, 1):
                ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "ecore0")
                for device in ("ecore0", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


COMMAND = """
import sys
from ecore.cli import main
from ecore.training import distributed

distributed.BEAT, distributed.SILENT = 1.0, 12.0  # 4 and 40 seconds for users
sys.exit(main(sys.argv[1:]))
"""


def start(hosts: list[str], script: Path, rank: int, *arguments: str) -> subprocess.Popen[str]:
    """Start a host's torchrun agent, as the head of a group of processes."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    where = ["--node-rank", str(rank), "--master-addr", "10.77.0.1", "--master-port", "29555"]
    environment = {**python_path(), "GLOO_SOCKET_IFNAME": "ecore0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["ip", "netns", "exec", hosts[rank], *agent, *where, str(script), *arguments],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def together(hosts: list[str], folder: Path, *commands: list[str]) -> None:
    """Run commands on both hosts, one after the other in processes that are started once, until all are done."""
    script = in_turn(folder, *commands)
    agents = [start(hosts, script, rank) for rank in range(2)]
    try:
        # The first to end may be the second: the other would wait minutes for one that has failed.
        deadline = time.monotonic() + 200
        while any(agent.poll() is None for agent in agents):
            assert time.monotonic() < deadline
            if any(agent.poll() for agent in agents):
                break
            time.sleep(0.1)
        for agent in agents:
            if agent.poll() is not None:
                assert agent.returncode == 0, agent.communicate()[1]
    finally:
        for agent in agents:
            die(agent)


def die(agent: subprocess.Popen[str]) -> None:
    """Kill all of a host's processes at once, as a power cut does."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    for pid in [str(agent.pid), *children]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


class Lost(NamedTuple):
    """A run of two hosts of which one was lost: which, what the other said and when it ended."""

    run: Path
    said: str
    code: int
    seconds: float
    reached: int


def lose(hosts: list[str], prepared: Path, folder: Path, victim: int, how: str) -> Lost:
    """Kill a host, or cut its cable, after the first checkpoint of a training that would go on for long."""
    run, script = folder / "run", folder / "command.py"
    script.write_text(COMMAND)
    command = train(prepared, run, "--max-steps", "100000", "--checkpoint-every", "5", "--log-every", "1")
    agents = [start(hosts, script, rank, *command) for rank in range(2)]
    try:
        deadline = time.monotonic() + 200
        while not (run / "checkpoints.json").exists():
            assert time.monotonic() < deadline
            assert all(agent.poll() is None for agent in agents), agents[0].communicate()
            time.sleep(0.1)
        begin = time.monotonic()
        if how == "killed":
            die(agents[victim])
        else:
            ip("-n", hosts[victim], "link", "set", "ecore0", "down")
        _, said = agents[1 - victim].communicate(timeout=120)
        seconds = time.monotonic() - begin
    finally:
        for agent in agents:
            die(agent)
        ip("-n", hosts[victim], "link", "set", "ecore0", "up")
    return Lost(run, said, agents[1 - victim].returncode, seconds, read_metrics(run)[-1]["step"])


@pytest.fixture(scope="module")
def lost(hosts, prepared_folder, tmp_path_factory) -> dict[tuple[int, str], Lost]:
    """A run for each way in which a host is lost."""
    ways = [(0, "killed"), (1, "killed"), (1, "cut off")]
    return {way: lose(hosts, prepared_folder, tmp_path_factory.mktemp("lost"), *way) for way in ways}


@pytest.fixture(scope="module")
def trained(hosts, prepared_folder, lost, tmp_path_factory) -> Path:
    """A run of two hosts from beginning to end; the same processes go on with the lost ones, for three steps each."""
    folder = tmp_path_factory.mktemp("two")
    resumed = [resume(one.run, one.reached + 3, "--threads", "1") for one in lost.values()]
    together(hosts, folder, train(prepared_folder, folder / "run"), *resumed)
    return folder / "run"


def test_two_hosts_train_as_one_process(trained, prepared_folder, tmp_path):
    alone = [sys.executable, "-m", "ecore", *train(prepared_folder, tmp_path / "one")]
    subprocess.run(alone, env=python_path(), cwd=ROOT, check=True, capture_output=True, timeout=300)
    compare(trained, tmp_path / "one")


@pytest.mark.parametrize(
    "victim, how, complaint",
    [
        (0, "killed", "another process of this training has ended; the last checkpoint is kept"),
        (1, "killed", "another process of this training has ended; the last checkpoint is kept"),
        (1, "cut off", r"no sign of life of process 1 in \d+ seconds; the last checkpoint is kept"),
    ],
)
def test_a_host_that_is_lost_ends_the_other_and_the_run_goes_on(lost, trained, victim, how, complaint):
    one = lost[victim, how]
    assert one.seconds < WITHIN
    assert one.code != 0
    errors = [line for line in one.said.splitlines() if "ecore: error:" in line]
    assert len(errors) == 1, one.said
    assert re.search(complaint, errors[0])
    assert read_metrics(one.run)[-1]["step"] == one.reached + 3
