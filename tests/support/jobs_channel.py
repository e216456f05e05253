"""Two ends of a channel: in one process as threads, or the other end in a process that may be killed or stopped."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from seqpar.offload.channel import Channel, Link
from seqpar.offload.frames import Kind
from seqpar.offload.meeting import Porch, host_store, join_store, knock
from support.ranks import _processes


def make_links(bulk: bool = False) -> tuple[Link, Link]:
    """Both ends of a connection, in this process; a second gloo group stands where NCCL would."""
    store = dist.HashStore()
    device = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")

    def connect(rank: int) -> Link:
        groups = []
        for name in ("control", "bulk")[: 1 + bulk]:
            options = dist.ProcessGroupGloo._Options()
            options._timeout, options._threads, options._devices = timedelta(seconds=20), 1, [device]
            groups.append(dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, 2, options))
        return Link(groups[0], 1 - rank, groups[1] if bulk else None)

    return both(lambda: connect(0), lambda: connect(1))


@contextlib.contextmanager
def channels(bulk: bool = False, deadline: float = 20.0, **options: Any) -> Iterator[tuple[Channel, Channel]]:
    """Two channels that are each other's other end."""
    here, there = (Channel(link, deadline=deadline, **options) for link in make_links(bulk))
    try:
        yield here, there
    finally:
        here.close()
        there.close()


def both(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """What two functions return that wait for each other."""
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(first), pool.submit(second)
        return one.result(60), other.result(60)


def send_raw(link: Link, *messages: bytes) -> list[Any]:
    """Start sending ``messages`` as they are; keep what is returned until they have arrived."""
    tensors = [torch.frombuffer(bytearray(message), dtype=torch.uint8) for message in messages]
    return [(link.control.send([tensor], link.peer, 0), tensor) for tensor in tensors]


@contextlib.contextmanager
def peer_process(deadline: float, **options: Any) -> Iterator[tuple[BaseProcess, Channel]]:
    """A process at the other end that answers every frame with its payload, and the channel to it."""
    with host_store("127.0.0.1:0") as hosted:
        porch = Porch(hosted.store)
        worker = porch.register({})
        process = _processes.Process(target=echo, args=(hosted.address, worker), daemon=True)
        process.start()
        try:
            channel = Channel(porch.let_in(first_caller(porch)), deadline=deadline, **options)
            yield process, channel
            channel.close()
        finally:
            process.kill()
            process.join()


def echo(address: str, worker: int) -> None:
    """Answer every frame with its own payload until BYE, then send one last frame and end."""
    torch.set_num_threads(1)
    channel = Channel(knock(join_store(address, 20), worker, 20), deadline=60)
    while (frame := channel.receive()).header.kind != Kind.BYE:
        values = [] if frame.header.dtype is None else [frame.payload.view(frame.header.dtype)]
        channel.send(Kind.RESULT, *values, argument=frame.header.argument)
    channel.send(Kind.BYE)
    channel.flush()
    channel.close()


def keep_store(pipe: Connection) -> None:
    """Serve a store, and tell its address."""
    with host_store("127.0.0.1:0") as hosted:
        pipe.send(hosted.address)
        time.sleep(60)


def first_caller(porch: Porch, timeout: float = 30.0) -> int:
    """The number of the next caller, once there is one."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for number in porch.waiting():
            return number
        time.sleep(0.005)
    raise AssertionError("nobody knocked")


def later(seconds: float, action: Callable[[], Any]) -> threading.Timer:
    """Do ``action`` in ``seconds``, in a thread."""
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer
