"""How model ranks find attention workers: through a store. Every pair then has a connection of its own.

Workers register in the store under numbers that are never used twice. A model rank knocks at a worker: it leaves word
under a new number of its own, and the worker, when it looks, lets it in. The two make a gloo group of two (and an NCCL
group where both have a GPU), so that the loss of one process ends its own connections and no others.

All that is left in the store is JSON of at most 64 KiB, checked when it is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .channel import Link, Lost, parse
from .frames import FrameError

T = TypeVar("T")

MOST_TEXT = 64 << 10
"""Most bytes of one text in the store."""

_MOST_NUMBERS = 1 << 16
_CALLERS_A_LOOK = 64
_POLL = 0.005
BEAT, SILENCE = 0.5, 5.0
"""Seconds between a worker's signs of life, and after how many without one it counts as gone."""
_GRACE = 0.5


class Hosted:
    """A store that this process serves: ``store``, and the ``address`` ("HOST:PORT") at which others join it.

    A context manager; the store is gone after ``close``, once no one here holds ``store`` any more.
    """

    def __init__(self, store: dist.Store, address: str) -> None:
        self.store, self.address = store, address

    def close(self) -> None:
        """Drop the store; a second call does nothing."""
        self.__dict__.pop("store", None)

    def __enter__(self) -> Hosted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def host_store(address: str) -> Hosted:
    """Serve a store on exactly the interface that ``address`` names: "HOST:PORT", port 0 for a free one.

    Raises ValueError for a malformed address, for one of all interfaces, and for one that cannot be had here.
    """
    host, port = _parse_address(address, free_port=True)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(socket.socket(family, kind, protocol))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            if where[0] in ("0.0.0.0", "::"):
                raise ValueError(f"address: got {address!r}, expected one interface's; the store has no password")
            listening.listen()
            port = listening.getsockname()[1]
            # Without a socket of ours the store would listen on every interface.
            store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listening.fileno())
            )
    except OSError as error:
        raise ValueError(f"address: got {address!r} ({error}), expected a free one of this host; use port 0") from None
    return Hosted(store, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def join_store(address: str, timeout: float) -> dist.Store:
    """The store served at ``address`` ("HOST:PORT").

    Args:
        address: what :func:`host_store` said.
        timeout: seconds to keep trying.

    Raises:
        ValueError: a malformed address.
        Lost: nobody serves a store there within ``timeout``.
    """
    host, port = _parse_address(address)
    end = time.monotonic() + timeout
    # TCPStore's own attempts outlast its timeout and fill stderr: it begins when somebody listens.
    while True:
        try:
            socket.create_connection((host, port), timeout=max(end - time.monotonic(), 0.01)).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                raise Lost(_nobody(address, timeout, str(error))) from None
        time.sleep(0.05)

    def join() -> dist.Store:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=max(timeout, 1)))

    # Someone who listens but speaks otherwise keeps TCPStore waiting for ever.
    try:
        return _within(max(end - time.monotonic(), 1), join)
    except (TimeoutError, RuntimeError):
        raise Lost(_nobody(address, timeout, "somebody listens, but serves no store")) from None


class Porch:
    """A worker's side of the meeting: it registers, sees who has knocked, and lets them in.

    Args:
        store: a store of its own; callers are let in over clones of it.
        device: where payloads should arrive.
    """

    def __init__(self, store: dist.Store, device: torch.device | None = None) -> None:
        self._store, self._device = store, device or torch.device("cpu")
        self._number: int | None = None
        self._last = self._seen = 0
        self._next_beat = 0.0

    def register(self, info: dict[str, Any]) -> int:
        """Enter this worker with ``info`` (a JSON object), once. Returns its number, which was never used before."""
        if self._number is not None:
            raise ValueError(f"porch: got a second register, expected one; worker {self._number} is registered")
        text = _text({"info": info, "gpu": _gpu(self._device)}, "info")
        with _reaching("the store"):
            self._number = self._last = self._store.add("workers", 1) - 1
            self._store.set(f"worker/{self._number}", text)
        return self._number

    def waiting(self) -> Iterator[int]:
        """Numbers of callers who have knocked since the last look, each once; never waits for one."""
        with _reaching("the store"):
            if time.monotonic() > self._next_beat:
                self._next_beat = time.monotonic() + BEAT
                self._store.add(f"worker/{self._registered()}/beats", 1)
            count = self._store.add(f"worker/{self._registered()}/callers", 0)
        for number in range(self._seen, min(count, self._seen + _CALLERS_A_LOOK)):
            self._seen = number + 1
            yield number

    def let_in(self, number: int, timeout: float = 30.0) -> Link:
        """The connection with caller ``number``: for a thread of its own, since it waits for the caller.

        Raises:
            Lost: the caller did not meet us within ``timeout`` seconds.
            FrameError: what the caller left in the store is malformed.
        """
        end = time.monotonic() + timeout
        place = f"worker/{self._last}/caller/{number}"  # also when the worker has left meanwhile
        with _reaching(f"caller {number}"):
            store = _another(self._store)
            _await(store, place, end, f"caller {number}", timeout)
            theirs = _gpu_of(_read(store, place), place)
            mine = _gpu(self._device)
            # NCCL has no two ranks on one GPU.
            bulk = bool(theirs and mine and theirs != mine)
            store.set(f"{place}/answer", _text({"bulk": bulk}, "answer"))
            return _connect(store, place, 0, bulk, self._device, end)

    def leave(self) -> None:
        """Take the worker's entry out of the store; a second call does nothing."""
        if self._number is not None:
            strike_out(self._store, self._number)
            self._number = None

    def _registered(self) -> int:
        if self._number is None:
            raise ValueError("porch: got no worker, expected a registered one; call register first")
        return self._number


def strike_out(store: dist.Store, worker: int) -> None:
    """Take a worker's entry out of the store, as when it leaves. Raises Lost without the store."""
    with _reaching("the store"):
        # Emptied, not deleted: who has seen it and reads it now would wait for it to come back.
        store.set(f"worker/{worker}", "")


def workers(store: dist.Store, timeout: float = 30.0) -> dict[int, dict[str, Any]]:
    """Who is registered, with the info that each gave.

    Raises Lost if the store does not answer within ``timeout`` seconds, FrameError for a malformed entry.
    """
    with _reaching("the store"):
        return _within(timeout, lambda: _workers(store))


def knock(store: dist.Store, worker: int, timeout: float, device: torch.device | None = None) -> Link:
    """The connection with worker number ``worker``.

    Args:
        store: where the worker is registered.
        worker: one of :func:`workers`.
        timeout: seconds to wait for being let in.
        device: where payloads should arrive; None: the CPU.

    Raises:
        Lost: no such worker, or it did not let us in within ``timeout``.
        FrameError: what the worker left in the store is malformed.
    """
    end = time.monotonic() + timeout
    with _reaching(f"worker {worker}"):
        # The steps keep the time themselves, unless the store's host has stopped.
        return _within(timeout + _GRACE, lambda: _knock(store, worker, end, timeout, device or torch.device("cpu")))


def _workers(store: dist.Store) -> dict[int, dict[str, Any]]:
    count = store.add("workers", 0)
    if not 0 <= count <= _MOST_NUMBERS:
        raise FrameError("workers", count, f"0 to {_MOST_NUMBERS}")
    entries = {number: _entry(store, number) for number in range(count)}
    return {number: entry["info"] for number, entry in entries.items() if entry is not None}


def _knock(store: dist.Store, worker: int, end: float, timeout: float, device: torch.device) -> Link:
    store = _another(store)
    if not 0 <= worker < store.add("workers", 0) or _entry(store, worker) is None:
        raise Lost(f"worker {worker} is not registered; choose one of {sorted(_workers(store))}")
    number = store.add(f"worker/{worker}/callers", 1) - 1
    place = f"worker/{worker}/caller/{number}"
    store.set(place, _text({"gpu": _gpu(device)}, "caller"))
    is_gone = _Pulse(store, worker).is_gone
    _await(store, f"{place}/answer", end, f"worker {worker}", timeout, left=is_gone)
    bulk = _read(store, f"{place}/answer").get("bulk")
    if not isinstance(bulk, bool):
        raise FrameError(f"{place}/answer", repr(bulk), "true or false for bulk")
    return _connect(store, place, 1, bulk, device, end)


class _Pulse:
    """Whether a worker still looks for callers: one that was killed is registered for ever."""

    def __init__(self, store: dist.Store, worker: int) -> None:
        self._store, self._worker, self._beats, self._since = store, worker, -1, 0.0

    def is_gone(self) -> bool:
        """It has left, or was not seen to look for :data:`SILENCE` seconds."""
        beats = self._store.add(f"worker/{self._worker}/beats", 0)
        if beats != self._beats:
            self._beats, self._since = beats, time.monotonic()
        return time.monotonic() - self._since > SILENCE or _entry(self._store, self._worker) is None


def _connect(store: dist.Store, place: str, rank: int, bulk: bool, device: torch.device, end: float) -> Link:
    timeout = timedelta(seconds=max(end - time.monotonic(), 0.1))
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._threads = 1  # for collectives, of which there are none
    options._devices = [_gloo_device(store)]
    control = gloo(dist.PrefixStore(f"{place}/control", store), rank, 2, options)
    group = None
    if bulk:
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        group = dist.ProcessGroupNCCL(dist.PrefixStore(f"{place}/bulk", store), rank, 2, nccl)
        group.eager_connect_single_device(device)
    return Link(control, 1 - rank, group, device if bulk else torch.device("cpu"))


def _gloo_device(store: dist.Store) -> Any:
    """The interface that leads to the store, unless gloo's own variable names one."""
    host, port = getattr(store, "host", None), getattr(store, "port", 0)
    if host and not os.environ.get("GLOO_SOCKET_IFNAME"):
        # A host's own name often stands for another interface, or for none that the peer can reach.
        with contextlib.suppress(OSError):
            family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as route:
                route.connect(where)
                return dist.ProcessGroupGloo.create_device(hostname=route.getsockname()[0])
    return dist.ProcessGroupGloo.create_default_device()


def _another(store: Any) -> dist.Store:
    """A client of its own: calls of one wait for each other."""
    store.check(["workers"])  # fails at once where a clone would try to reach a lost store for its whole timeout
    return store.clone()


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _gpu_of(entry: dict[str, Any], key: str) -> str:
    gpu = entry.get("gpu")
    if not isinstance(gpu, str):
        raise FrameError(key, repr(gpu), "a text for gpu")
    return gpu


def _entry(store: dist.Store, worker: int) -> dict[str, Any] | None:
    """What worker number ``worker`` registered; None before, and after it has left."""
    key = f"worker/{worker}"
    if not store.check([key]) or not store.get(key):
        return None
    entry = _read(store, key)
    if not isinstance(entry.get("info"), dict):
        raise FrameError(key, "an entry without info", "an object with info")
    return entry


def _await(store: dist.Store, key: str, end: float, who: str, timeout: float, left: Any = lambda: False) -> None:
    """Poll for ``key``: a wait would keep the store from other threads, and complain on stderr when it ends."""
    while not store.check([key]):
        if time.monotonic() > end:
            raise Lost(f"{who} did not answer within {timeout:g} s; is it running, and not busy?")
        if left():
            raise Lost(f"{who} has left")
        time.sleep(_POLL)


def _text(value: dict[str, Any], name: str) -> str:
    text = json.dumps(value)
    if len(text) > MOST_TEXT:
        raise ValueError(f"{name}: got {len(text)} bytes of JSON, expected at most {MOST_TEXT}; say less")
    return text


def _read(store: dist.Store, key: str) -> dict[str, Any]:
    data = store.get(key)
    if len(data) > MOST_TEXT:
        raise FrameError(key, f"{len(data)} bytes", f"at most {MOST_TEXT}")
    return parse(data, key)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises, or TimeoutError: then it goes on in a thread, whose result is dropped."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer of the store within {seconds:.3g} s")
    value, error = outcome.pop()
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def _reaching(whom: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TimeoutError) as error:  # of stores and of gloo
        reason = str(error).split("\n")[0]
        raise Lost(f"{whom} could not be reached: {reason}") from None


def _parse_address(address: str, free_port: bool = False) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^\[\]:\s]+)):(\d{1,5})", address)
    if not match or not (0 if free_port else 1) <= int(match[3]) <= 65535:
        expected = f"HOST:PORT, or [HOST]:PORT for IPv6, with a port of {0 if free_port else 1} to 65535"
        raise ValueError(f"address: got {address!r}, expected {expected}; 127.0.0.1:29500, say")
    return match[1] or match[2], int(match[3])


def _nobody(address: str, timeout: float, reason: str) -> str:
    return (
        f"store: got nobody at {address} within {timeout:g} s ({reason}), "
        "expected the store of the attention workers; start them first, or mend the address"
    )
