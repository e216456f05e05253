"""Attention workers as processes that can be held up, stopped and killed, and model ranks that vanish."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

import seqpar
from seqpar.offload import OffloadedCache, Worker, Workers
from seqpar.offload.frames import Kind
from seqpar.offload.meeting import host_store, join_store
from support.network import enter
from support.ranks import _processes

LOOPBACK = "127.0.0.1:0"


class WorkerProcess:
    """A worker in a process of its own, which takes orders."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process, self.pid, self._pipe = process, process.pid or 0, pipe
        self.address: str = self._answer()

    def hold(self) -> None:
        """From now on somebody else computes, until :meth:`release`: calls wait for their turn."""
        self._order("hold")

    def release(self) -> None:
        """Let calls compute."""
        self._order("release")

    def leftovers(self) -> dict[str, int]:
        """What it has: bytes free, shards, sessions, threads and descriptors."""
        return self._order("leftovers")

    def send_signal(self, number: int) -> None:
        """SIGKILL, SIGSTOP or SIGCONT."""
        os.kill(self.pid, number)

    def end(self) -> None:
        """Whatever state it is in."""
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def _order(self, name: str) -> Any:
        self._pipe.send(name)
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(60):
            raise AssertionError("a worker process did not answer")
        return self._pipe.recv()


@contextlib.contextmanager
def worker_process(address: str = "", *, namespace: str = "", **options: Any) -> Iterator[WorkerProcess]:
    """A worker at the store of ``address``, or with one of its own where that has no port yet (port 0)."""
    pipe, theirs = _processes.Pipe()
    process = _processes.Process(
        target=_serve, args=(theirs, address or LOOPBACK, namespace, options), daemon=True
    )  # fmt: skip
    process.start()
    theirs.close()
    worker = None
    try:
        worker = WorkerProcess(process, pipe)
        yield worker
    finally:
        process.kill()
        process.join()
        pipe.close()


def _serve(pipe: Connection, address: str, namespace: str, options: dict[str, Any]) -> None:
    if namespace:
        enter(namespace)
    torch.set_num_threads(1)
    hosted = host_store(address) if address.endswith(":0") else None
    worker = Worker(hosted.store if hosted else join_store(address, 20), threads=1, **options)
    threading.Thread(target=worker.run, daemon=True).start()
    while worker.number < 0:
        time.sleep(0.002)
    pipe.send(hosted.address if hosted else address)
    orders: dict[str, Callable[[], Any]] = {
        "hold": worker.common.computes.acquire,
        "release": worker.common.computes.release,
        "leftovers": lambda: _leftovers(worker),
    }
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(orders[pipe.recv()]())


def _leftovers(worker: Worker) -> dict[str, int]:
    common = worker.common
    return {
        "free": common.budget.free,
        "shards": sum(len(session.shards) for session in list(common.sessions)),
        "sessions": len(common.sessions),
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def settled(read: Callable[[], Any], wanted: Any, seconds: float = 10.0) -> Any:
    """What ``read`` returns, once it is ``wanted`` or so many seconds are over."""
    end = time.monotonic() + seconds
    while (found := read()) != wanted and time.monotonic() < end:
        time.sleep(0.02)
    return found


class Text:
    """Steps of a random text in a cache of two rows and two layers, and what a cache on this rank says to them."""

    HEADS, DIM, ROWS, LAYERS = (4, 2), 8, 2, 2

    def __init__(self, steps: int, seed: int = 0) -> None:
        made = torch.Generator().manual_seed(seed)
        (heads, kv_heads), dim = self.HEADS, self.DIM
        self.tokens = [5, *[1] * (steps - 1)]
        self._inputs = [
            [
                [torch.randn(self.ROWS, count, n, dim, generator=made) for n in (heads, kv_heads, kv_heads)]
                for _ in range(self.LAYERS)
            ]
            for count in self.tokens
        ]
        local = seqpar.KVCache(seqpar.Causal(), **self.options())
        self.expected = [
            [local.attend(*inputs, layer=layer) for layer, inputs in enumerate(step)] for step in self._inputs
        ]

    def options(self) -> dict[str, Any]:
        """Of a cache for it."""
        return {
            "heads": self.HEADS, "head_dim": self.DIM, "batch": self.ROWS, "layers": self.LAYERS, "capacity": 64,
            "page": 4,
        }  # fmt: skip

    def cache(self, workers: Workers, **options: Any) -> OffloadedCache:
        """On workers."""
        return OffloadedCache(seqpar.Causal(), workers=workers, **self.options(), **options)

    def call(self, cache: OffloadedCache, step: int, layer: int) -> None:
        """A call of a step, whose result must be exact."""
        out = cache.attend(*self._inputs[step][layer], layer=layer)
        torch.testing.assert_close(out, self.expected[step][layer], rtol=1e-5, atol=1e-6)

    def step(self, cache: OffloadedCache, step: int) -> None:
        """All layers of a step."""
        for layer in range(self.LAYERS):
            self.call(cache, step, layer)

    def write_anew(self, cache: OffloadedCache, row: int, steps: int) -> None:
        """The first steps of one row only; others are as they were."""
        for step in range(steps):
            counts = [self.tokens[step] if each == row else 0 for each in range(self.ROWS)]
            for layer in range(self.LAYERS):
                out = cache.attend(*self._inputs[step][layer], layer=layer, counts=counts)
                torch.testing.assert_close(out[row], self.expected[step][layer][row], rtol=1e-5, atol=1e-6)


def half_a_call(workers: Workers, text: Text) -> OffloadedCache:
    """A cache with a step in it, and the queries of another, to which no keys will come."""
    cache = text.cache(workers)
    text.step(cache, 0)
    for member, parts in cache._remote.by_member():
        queries = [torch.zeros(1, part.queries.stop - part.queries.start, text.DIM) for part in parts]
        roster = member.roster(tuple(part.shard for part in parts), None)
        member.send(Kind.ATTEND, *queries, layer=0, tokens=1, roster=roster, argument=0)
        member.channel.flush()
    return cache


def vanish(address: str, connections: int) -> None:
    """Some connections in the middle of a call, in a process that ends as if it had been killed."""
    torch.set_num_threads(1)
    text = Text(1)
    held = []
    for _ in range(connections):
        workers = Workers.join(address, deadline=20)
        held.append((workers, half_a_call(workers, text)))
    os.kill(os.getpid(), signal.SIGKILL)
