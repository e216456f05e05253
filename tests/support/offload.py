"""Attention workers in processes of their own, found through a store of their own; all end with the test."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from seqpar.offload import Worker, Workers
from seqpar.offload.frames import HEADER_BYTES, TRAILER_BYTES
from seqpar.offload.meeting import host_store, join_store
from seqpar.offload.workers import Member
from support.ranks import _processes

MEMORY = 64 << 20
FRAME = HEADER_BYTES + TRAILER_BYTES
Moved = dict[str, tuple[int, int]]  # by direction and kind: frames, bytes of payload


class Crew:
    """Workers of one store."""

    def __init__(self, address: str, processes: dict[str, BaseProcess]) -> None:
        self.address, self._processes = address, processes

    def join(self, **options: Any) -> Workers:
        """A connection to each that lives."""
        living = sum(process.is_alive() for process in self._processes.values())
        return Workers.join(self.address, **{"least": living, "deadline": 20, "timeout": 30} | options)

    def kill(self, member: Member) -> None:
        """As a power cut would; it is gone when this returns."""
        process = self._processes[member.info["name"]]
        process.kill()
        process.join()

    def ask_to_leave(self, member: Member) -> None:
        """What a worker does on a signal."""
        self._processes[member.info["name"]].terminate()

    def ended(self, member: Member) -> bool:
        """Whether a worker ends by itself, soon, and well."""
        process = self._processes[member.info["name"]]
        process.join(10)
        return process.exitcode == 0


@contextlib.contextmanager
def crew(*workers: dict[str, Any]) -> Iterator[Crew]:
    """Start workers, each with these options of :class:`seqpar.offload.Worker`, numbered in this order."""
    with host_store("127.0.0.1:0") as hosted:
        processes = {
            f"w{number}": _processes.Process(target=serve, args=(hosted.address, number, options), daemon=True)
            for number, options in enumerate(workers)
        }
        for process in processes.values():
            process.start()
        try:
            yield Crew(hosted.address, processes)
        finally:
            for process in processes.values():
                process.kill()
                process.join()


def serve(address: str, number: int, options: dict[str, Any]) -> None:
    """A worker's process."""
    torch.set_num_threads(1)
    store = join_store(address, 60)
    while store.add("workers", 0) < number:  # so that their numbers are known
        time.sleep(0.002)
    worker = Worker(store, **{"memory": MEMORY, "name": f"w{number}", "threads": 1} | options)
    signal.signal(signal.SIGTERM, lambda *_: worker.leave())
    worker.run()


def moved(workers: Workers, call: Callable[[], Any]) -> tuple[Moved, int]:
    """What a call moves over all connections: frames and payload by direction and kind; and all bytes."""
    before, total = _moved(workers)
    call()
    after, more = _moved(workers)
    found = {key: tuple(x - y for x, y in zip(now, before.get(key, (0, 0)), strict=True)) for key, now in after.items()}
    return {key: change for key, change in found.items() if any(change)}, more - total


def _moved(workers: Workers) -> tuple[Moved, int]:
    found, total = Moved(), 0
    for member in workers.members.values():
        for direction in ("sent", "received"):
            tally = getattr(member.channel, direction)
            total += tally.total
            for kind, change in tally.by_kind.items():
                had = found.get(f"{direction} {kind.name}", (0, 0))
                found[f"{direction} {kind.name}"] = had[0] + change[0], had[1] + change[1]
    return found, total


def free_of(workers: Workers, wanted: dict[int, int] | None = None) -> dict[int, int]:
    """Bytes free on each worker; those ``wanted``, as soon as they are: the end of a connection is seen a bit later."""
    end = time.monotonic() + 10
    while (free := workers.free()) != wanted and wanted is not None and time.monotonic() < end:
        time.sleep(0.01)
    return free
