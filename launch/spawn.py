"""Ranks on this machine: one process each, watched, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BAD_INPUT, FAILED

GRACE = 10.0
"""Seconds that the other ranks get to say what they saw before they are stopped."""

# Started with -c, so that no file of the current folder shadows a package: `python -m` would put it first on the path.
_RUN = "import sys; sys.path[:1] == [''] and sys.path.pop(0); from seqpar.launch.cli import {0}; sys.exit({0}())"


@dataclass(frozen=True)
class Place:
    """Where a rank stands among all ranks, and where they meet. local_rank and local_size count on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    rendezvous: str


def torchrun_place() -> Place | None:
    """This process's place as torchrun gave it through the environment; None where torchrun didn't start it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names[:4])
    return Place(rank, size, local_rank, local_size, rendezvous="env://")


@contextmanager
def alone() -> Iterator[Place]:
    """The place of a single rank in this process."""
    with tempfile.TemporaryDirectory(prefix="seqpar-") as folder:
        yield Place(0, 1, 0, 1, f"file://{folder}/store")


def child_place(argv: Sequence[str]) -> tuple[Place, list[str]]:
    """A started rank's place and the command's arguments, from its own; ends the process when the launcher ends."""
    rank, size, rendezvous, *rest = argv
    end_with_launcher()
    return Place(int(rank), int(size), int(rank), int(size), rendezvous), rest


def end_with_launcher() -> None:
    """From now on this process, which :func:`start` or :func:`start_job` started, ends when its launcher does."""
    threading.Thread(target=_wait_for_launcher, daemon=True).start()


def _wait_for_launcher() -> None:
    # The launcher holds the other end of this pipe and never writes: it closes when the launcher ends, however it ends.
    os.read(0, 1)
    os._exit(FAILED)


def run_ranks(number: int, argv: Sequence[str], advice: Callable[[], str]) -> int:
    """Run the command `argv` on `number` ranks of this machine, and return its exit code.

    When a rank fails, the others get a few seconds to end by themselves and are then stopped, and one line says which
    rank failed and how, with the `advice`. None outlives this call, nor the process that makes it.
    """
    with tempfile.TemporaryDirectory(prefix="seqpar-") as folder, _signals_raise():
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(number):
                ranks.append(start(rank, number, f"file://{Path(folder, 'store')}", argv))
            failed, code = _first_failure(ranks)
            if code == 0:
                return 0
            _wait(ranks, GRACE)
        except KeyboardInterrupt:
            print("seqpar: interrupted; all ranks were stopped", file=sys.stderr)
            return 128 + signal.SIGINT
        finally:
            end(ranks)
    if code == BAD_INPUT:
        return BAD_INPUT
    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    print(f"seqpar: rank {failed} {how}; the other ranks were stopped; {advice()}", file=sys.stderr, flush=True)
    return FAILED


def start(rank: int, size: int, rendezvous: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that is this rank of the command `argv`, and ends when this process does."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    return subprocess.Popen(
        [sys.executable, "-c", _RUN.format("child"), str(rank), str(size), rendezvous, *argv],
        stdin=subprocess.PIPE,
        env={**os.environ, **{name: str(value) for name, value in place.items()}},
        # A session of its own: Ctrl-C reaches the launcher alone, which stops the ranks.
        start_new_session=True,
    )


def start_job(argv: Sequence[str]) -> subprocess.Popen[str]:
    """The command `argv` in a process that ends when this one does; its stderr is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", _RUN.format("job"), *argv],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Wait until all ranks have ended well, (0, 0), or one has not: its number and exit code."""
    while True:
        codes = [rank.poll() for rank in ranks]
        # A rank that was killed comes first: the others fail because of it, and may be seen in the same moment.
        failures = sorted((code, number) for number, code in enumerate(codes) if code)
        if failures:
            code, number = failures[0]
            return number, code
        if None not in codes:
            return 0, 0
        time.sleep(0.05)


def _wait(ranks: Sequence[subprocess.Popen[Any]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def end(ranks: Sequence[subprocess.Popen[Any]]) -> None:
    """End these processes, whatever they are at."""
    for stop, seconds in ((subprocess.Popen.terminate, 3.0), (subprocess.Popen.kill, 60.0)):
        for rank in ranks:
            if rank.poll() is None:
                stop(rank)
        _wait(ranks, seconds)
    for rank in ranks:
        if rank.stdin is not None:
            rank.stdin.close()


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, through its clean-up."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    wanted = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
