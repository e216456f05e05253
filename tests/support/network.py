"""Hosts of a network of their own: network namespaces, and a process that carries packets between them as it is told.

Every host has a tun device; whatever leaves one arrives at another late, slowly or never. Neither bridges nor ``tc``
are needed, and nothing has to be taken down: namespaces and devices are gone when the processes are that are in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from support.ranks import _processes

_NEWNET = 0x40000000
_TUNSETIFF, _TUN, _NO_PACKET_INFO = 0x400454CA, 1, 0x1000
_QUEUE = 1 << 20  # bytes that wait for a link; what comes on top is lost, as in a router


class Unavailable(Exception):
    """What this machine lacks."""


def address(host: int) -> str:
    """Of a host, on the network."""
    return f"10.77.0.{host + 1}"


def enter(namespace: str) -> None:
    """Take this thread, and those that it starts, to the host of :meth:`Network.namespace`."""
    handle = os.open(namespace, os.O_RDONLY)
    try:
        _checked(_libc().setns(handle, _NEWNET))
    finally:
        os.close(handle)


class Network:
    """So many hosts, each with a link of its own to all the others."""

    def __init__(self, process: int, namespaces: list[int], pipe: Connection) -> None:
        self._process, self._namespaces, self._pipe = process, namespaces, pipe

    def namespace(self, host: int) -> str:
        """A path for :func:`enter`."""
        return f"/proc/{self._process}/fd/{self._namespaces[host]}"

    @contextlib.contextmanager
    def at(self, host: int) -> Iterator[None]:
        """Be on a host with this thread, for a while."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            enter(self.namespace(host))
            yield
        finally:
            _checked(_libc().setns(home, _NEWNET))
            os.close(home)

    def shape(self, host: int, *, rate: float = 1e12, delay: float = 0.0, up: bool = True) -> None:
        """Make a host's link carry so many bytes a second in each direction, each after so many seconds, or nothing."""
        self._pipe.send((host, rate, delay, up))
        self._pipe.recv()


@contextlib.contextmanager
def network(hosts: int) -> Iterator[Network]:
    """A network that is there for a while. Raises :class:`Unavailable` where it can't be."""
    if os.geteuid() != 0:
        raise Unavailable("root is missing, which makes network namespaces")
    for needed in ("/dev/net/tun", shutil.which("ip") or "the command ip"):
        if not os.path.exists(needed):
            raise Unavailable(f"{needed} is missing, for network namespaces joined by tun devices")
    pipe, theirs = _processes.Pipe()
    process = _processes.Process(target=_carry_packets, args=(theirs, hosts), daemon=True)
    process.start()
    theirs.close()
    try:
        found = pipe.recv()
        if isinstance(found, str):
            raise Unavailable(f"network namespaces can't be made here: {found}")
        yield Network(process.pid or 0, found, pipe)
    finally:
        process.kill()
        process.join()


@dataclass
class _Link:
    """A host's link: bytes a second, seconds, and until when each direction (out, in) is taken."""

    rate: float = 1e12
    delay: float = 0.0
    up: bool = True
    taken: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def passed(self, size: int, when: float, direction: int) -> float | None:
        """When a packet that comes ``when`` is through; None: never."""
        start = max(when, self.taken[direction])
        if not self.up or (start - when) * self.rate > _QUEUE:
            return None
        self.taken[direction] = start + size / self.rate
        return self.taken[direction] + self.delay


def _carry_packets(pipe: Connection, hosts: int) -> None:
    try:
        made = [_make_host(host) for host in range(hosts)]
    except (OSError, subprocess.SubprocessError) as error:
        pipe.send(str(error))
        return
    pipe.send([namespace for namespace, _ in made])
    devices, wires = [device for _, device in made], _Wires([_Link() for _ in made])
    while True:
        ready, _, _ = select.select([*devices, pipe], [], [], wires.seconds_to_next())
        if pipe in ready:
            try:
                host, *shape = pipe.recv()
            except EOFError:
                return
            wires.links[host] = _Link(*shape)
            pipe.send(None)
        for source, device in enumerate(devices):
            for packet in _packets(device) if device in ready else ():
                target = packet[19] - 1  # the last byte of an IPv4 destination
                if packet[0] >> 4 == 4 and 0 <= target < hosts:
                    wires.put(source, target, packet)
        for target, packet in wires.arrived():
            os.write(devices[target], packet)


class _Wires:
    """Packets under way: out of one host's link, then into another's."""

    def __init__(self, links: list[_Link]) -> None:
        self.links = links
        self._moving: list[tuple[float, int, int, bytes, bool]] = []
        self._count = 0

    def seconds_to_next(self) -> float | None:
        """Until a packet is through a link."""
        return max(0.0, self._moving[0][0] - time.monotonic()) if self._moving else None

    def put(self, source: int, target: int, packet: bytes) -> None:
        """Send one."""
        self._push(self.links[source].passed(len(packet), time.monotonic(), 0), target, packet, inside=False)

    def arrived(self) -> Iterator[tuple[int, bytes]]:
        """Those that are there."""
        while self._moving and self._moving[0][0] <= time.monotonic():
            when, _, target, packet, inside = heapq.heappop(self._moving)
            link = self.links[target]
            if not inside:
                self._push(link.passed(len(packet), when, 1), target, packet, inside=True)
            elif link.up:
                yield target, packet

    def _push(self, when: float | None, target: int, packet: bytes, *, inside: bool) -> None:
        if when is not None:
            self._count += 1
            heapq.heappush(self._moving, (when, self._count, target, packet, inside))


def _packets(device: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        for _ in range(64):
            yield os.read(device, 65536)


def _make_host(host: int) -> tuple[int, int]:
    """Handles of a new namespace, in which this process is then, and of its device."""
    _checked(_libc().unshare(_NEWNET))
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wire", _TUN | _NO_PACKET_INFO))
    for line in ("link set lo up", f"address add {address(host)}/24 dev wire", "link set wire txqueuelen 10000 up"):
        subprocess.run(["ip", *line.split()], check=True, capture_output=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), device


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
