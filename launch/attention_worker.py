"""One process of `seqpar attention-worker`: it meets the others at a store, and serves until it is told to leave."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seqpar.offload import Worker
from seqpar.offload.channel import Lost
from seqpar.offload.meeting import host_store, join_store
from seqpar.offload.serving import MEMORY_SHARE

from .attention_worker_config import AttentionWorkerConfig
from .distributed import cores
from .errors import FAILED, RunError
from .spawn import Place

PATIENCE = 60.0
"""Seconds to wait for a store."""
_GIB = 2**30
_POLL = 0.05


def run(config: AttentionWorkerConfig, place: Place) -> int:
    """Serve as this worker, and return its exit code. Raises ValueError for wrong input, RunError without a store."""
    device = device_of(config, place)
    memory = memory_of(config, device, place.local_size)
    if place.rendezvous == "env://":
        meeting: Any = _ByTorchrun(config, place)
    else:
        address, launch = place.rendezvous.split("#")
        meeting = Meeting(join(address), address, launch)

    def report(line: str) -> None:
        if worker.number in told:
            tell(f"worker {worker.number}: {line}")
        else:  # the first says that it is registered, and with how much memory: so does the launcher
            told.add(worker.number)
            meeting.say_ready(place.rank, worker.number)

    told = set[int]()
    threads = config.threads or max(1, cores() // place.local_size)
    worker = Worker(
        meeting.store, memory=memory, name=config.name or socket.gethostname(), device=device, threads=threads,
        deadline=config.deadline, lease=config.lease, connections=config.connections, report=report,
    )  # fmt: skip
    leaving = _Leaving(worker, config.grace)
    if place.rendezvous == "env://" and place.rank == 0:
        threading.Thread(target=meeting.announce, args=(place.size, memory), daemon=True).start()
    try:
        worker.run()
    except Lost as error:
        raise RunError(f"store {meeting.address}: {error}; start the workers again") from error
    return leaving.code


class Meeting:
    """The store at which workers register, and where those that were started together say that they have."""

    def __init__(self, store: dist.Store, address: str, launch: str) -> None:
        self.store, self.address, self.launch = store, address, launch

    def say_ready(self, rank: int, number: int) -> None:
        """This worker is registered under this number."""
        with contextlib.suppress(RuntimeError):  # without a store nobody is there to hear it
            self.store.set(self._key(rank), str(number))

    def number(self, rank: int) -> int | None:
        """The number of one of those that were started together, None until it is registered."""
        key = self._key(rank)
        return int(self.store.get(key)) if self.store.check([key]) else None

    def _key(self, rank: int) -> str:
        return f"launch/{self.launch}/{rank}"


class _ByTorchrun(Meeting):
    """Of workers that torchrun started: rank 0 serves the store, torchrun's own says where it is."""

    def __init__(self, config: AttentionWorkerConfig, place: Place) -> None:
        self._torchruns, _, _ = next(dist.rendezvous("env://"))
        if place.rank == 0:
            self._hosted = host_store(config.listen) if config.listen else None
            address = self._hosted.address if self._hosted else str(config.store)
            store = self._hosted.store if self._hosted else join(address)
            launch = new_launch(store)
            self._torchruns.set("seqpar/attention-workers", f"{address}#{launch}")
        else:
            address, launch = self._torchruns.get("seqpar/attention-workers").decode().split("#")
            store = join(address)
        super().__init__(store, address, launch)

    def announce(self, size: int, memory: int) -> None:
        """Wait for all, and say where they are."""
        store: Any = self.store
        mine = Meeting(store.clone(), self.address, self.launch)  # calls of one client wait for each other
        with contextlib.suppress(RuntimeError):
            while any(mine.number(rank) is None for rank in range(size)):
                time.sleep(_POLL)
            say_where(self.address, size, memory)


class _Leaving:
    """What signals do: the first SIGTERM asks model ranks to take what they have here elsewhere."""

    def __init__(self, worker: Worker, grace: float) -> None:
        self._worker, self._grace, self.code = worker, grace, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: object) -> None:
        if number == signal.SIGINT or self._worker.common.leaving:
            os._exit(128 + number)
        self._worker.leave()
        timer = threading.Timer(self._grace, self._overdue)
        timer.daemon = True
        timer.start()
        if not self._worker.is_empty:
            tell(f"worker {self._worker.number}: leaving, when model ranks have taken what they keep here elsewhere")

    def _overdue(self) -> None:
        tell(f"worker {self._worker.number}: model ranks still kept something here after {self._grace:g} s; it is lost")
        self.code = FAILED
        self._worker.stop()


def join(address: str) -> dist.Store:
    """The store at an address. Raises RunError where there is none."""
    try:
        return join_store(address, PATIENCE)
    except Lost as error:
        raise RunError(str(error)) from error


def new_launch(store: dist.Store) -> str:
    """A name, for those that are started together, that no others at this store have."""
    return str(store.add("launches", 1))


def say_where(address: str, number: int, memory: int) -> None:
    """One line for who starts model ranks."""
    workers = "1 worker" if number == 1 else f"{number} workers"
    tell(
        f"ready at {address}, {workers}, {memory / _GIB:.1f} GiB each; use: seqpar generate --attention-workers "
        f"{address} ..."
    )


def tell(line: str) -> None:
    """A line on stderr, in one piece."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"seqpar attention-worker: {line}\n")
        sys.stderr.flush()


def device_of(config: AttentionWorkerConfig, place: Place) -> torch.device:
    """Where this worker keeps what it holds; workers share GPUs where they outnumber them."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("--device is cuda; expected cpu, for there is no GPU here: leave it out")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def memory_of(config: AttentionWorkerConfig, device: torch.device, local_size: int) -> int:
    """Bytes for keys and values. A worker of a GPU has a share of that; others of this machine's."""
    if config.memory is not None:
        return int(config.memory * _GIB)
    if device.type == "cuda":
        sharing = -(-local_size // torch.cuda.device_count())
        return int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] / sharing)
    return int(MEMORY_SHARE * available_memory() / local_size)


def available_memory() -> int:
    """Bytes that this process could get: of the machine, or of its control group where that has less."""
    found = list[int]()
    with contextlib.suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        found += [int(match[1]) * 1024] if match else []
    group = Path("/sys/fs/cgroup")
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(max(0, int((group / most).read_text()) - int((group / used).read_text())))
    return min(found) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
