"""Attention workers as a model rank sees them: connections, memory, and turns."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .channel import Channel, Frame, Lost
from .dialect import LEAVING, ROSTERS
from .errors import NoRoomThere, WorkerLost, WorkerRefused
from .frames import FrameError, Kind
from .meeting import join_store, knock, workers

DEADLINE = 30.0
WAIT = 60.0


class Turns:
    """Batches that compute one at a time on a model rank: while one waits for its workers, another computes.

    Each batch has a thread of its own, which computes inside :meth:`mine`, and its own :class:`Workers`.

    Attributes:
        busy: seconds that some thread had its turn.
    """

    def __init__(self, *, keeps_random_state: bool = False) -> None:
        """``keeps_random_state``: each thread samples as if it were alone with PyTorch's CPU generator."""
        self._lock, self._keeps = threading.Lock(), keeps_random_state
        self._since, self._owner = 0.0, 0
        self.busy = 0.0

    @contextmanager
    def mine(self) -> Iterator[None]:
        """This thread computes; it waits until no other does."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def away(self) -> Iterator[None]:
        """This thread waits for something; others may compute meanwhile. Where it has no turn, nothing happens."""
        if self._owner != threading.get_ident():
            yield
            return
        state = torch.get_rng_state() if self._keeps else None
        self._end()
        try:
            yield
        finally:
            self._begin()
            if state is not None:
                torch.set_rng_state(state)

    def _begin(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()
        self._since = time.perf_counter()

    def _end(self) -> None:
        self.busy += time.perf_counter() - self._since
        self._owner = 0
        self._lock.release()


class Member:
    """One worker, and the connection to it."""

    def __init__(self, number: int, info: dict[str, Any], channel: Channel) -> None:
        self.number, self.info, self.channel = number, info, channel
        self.turns: Turns | None = None
        self.owed = 0  # replies that are still to come
        self.held: dict[object, set[int]] = {}  # sequences, of each cache
        self.lost: str | None = None
        self.leaving = False
        self.next_roster = self.next_shard = 0
        self._rosters: dict[object, int] = {}

    @property
    def holds(self) -> set[int]:
        """Sequences of which it has something."""
        return set().union(*self.held.values())

    @property
    def name(self) -> str:
        """By which messages call it."""
        return f"{self.number} ({self.info.get('name', 'unnamed')})"

    def send(self, kind: Kind, *tensors: Tensor, replies: bool = False, **fields: Any) -> None:
        """Start sending a frame. ``replies``: the worker will answer it. Raises :class:`WorkerLost`."""
        self.check()
        try:
            self.channel.send(kind, *tensors, **fields)
        except Lost as error:
            raise self._gone(error) from error
        self.owed += replies

    def reply(self, deadline: float | None = None) -> Frame:
        """The next answer. Raises :class:`WorkerLost`, and :class:`WorkerRefused` where the worker said no."""
        self.check()
        try:
            with self.turns.away() if self.turns is not None else nullcontext():
                frame = self.channel.receive(deadline)
            text = frame.text() if frame.header.kind is Kind.REFUSED else None
        except (Lost, FrameError) as error:
            raise self._gone(error) from error
        self.owed -= 1
        self.leaving |= bool(frame.header.flags & LEAVING)
        if text is not None:
            refusal = NoRoomThere if text.get("memory") else WorkerRefused
            raise refusal(f"attention worker {self.name}: {text.get('error', 'refused')}")
        return frame

    def ask(self, kind: Kind, *tensors: Tensor, **fields: Any) -> Frame:
        """Send a frame and wait for its answer, after those that nobody waits for any more."""
        self.drain()
        self.send(kind, *tensors, replies=True, **fields)
        return self.reply()

    def told(self, kind: Kind) -> dict[str, Any]:
        """What it says when it is asked; what is no text is a loss."""
        frame = self.ask(kind)
        try:
            return frame.text()
        except FrameError as error:
            raise self._gone(error) from error

    def answer(
        self, kind: Kind, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], deadline: float | None = None
    ) -> list[Tensor]:  # fmt: skip
        """The next answer's tensors, views until the second-next answer; one of another kind or size is a loss."""
        frame = self.reply(deadline)
        try:
            if frame.header.kind is not kind or frame.header.dtype is not dtype:
                got = f"{frame.header.kind.name} of {frame.header.dtype}"
                raise FrameError("answer", got, f"{kind.name} of {dtype}")
            return frame.tensors(*shapes)
        except FrameError as error:
            raise self._gone(error) from error

    def roster(self, shards: tuple[int, ...], counts: tuple[int, ...] | None) -> int:
        """The number by which calls name these shards, in this order, and how many tokens each gets (None: all)."""
        key = shards, counts
        if key not in self._rosters:
            if len(self._rosters) >= ROSTERS:  # the worker forgets its oldest likewise
                del self._rosters[next(iter(self._rosters))]
            number, self.next_roster = self.next_roster, self.next_roster + 1
            self.send(Kind.ROSTER, text={"shards": shards, "counts": counts}, roster=number)
            self._rosters[key] = number
        return self._rosters[key]

    def drain(self) -> None:
        """Take in the answers that nobody waits for any more."""
        end = time.monotonic() + self.channel.deadline
        while self.owed:
            try:
                self.reply(max(0.05, end - time.monotonic()))
            except WorkerRefused:
                continue

    def check(self) -> None:
        """Raise :class:`WorkerLost` if it is."""
        if self.lost is not None:
            raise WorkerLost(self.name, sorted(self.holds), self.lost)

    def _gone(self, error: Exception) -> WorkerLost:
        self.lost = str(error)
        self.channel.close()
        return WorkerLost(self.name, sorted(self.holds), self.lost)


class Workers:
    """This rank's connections to attention workers, each over a group of its own.

    ::

        with seqpar.offload.Workers.join("host:29600") as workers:
            cache = seqpar.offload.OffloadedCache(mask, heads=(32, 8), head_dim=128, workers=workers)

    What a rank had workers keep is freed when its connection ends, however it ends. Used by one thread; a second batch
    in rotation joins anew.

    Attributes:
        members: by number.
        absent: lines about those that were registered and did not answer.
    """

    def __init__(self, members: list[Member], turns: Turns | None) -> None:
        self.members = {member.number: member for member in members}
        for member in members:
            member.turns = turns
        self.absent: list[str] = []

    @classmethod
    def join(
        cls, address: str, *, deadline: float = DEADLINE, timeout: float = WAIT, least: int = 1,
        device: torch.device | str = "cpu", turns: Turns | None = None,
    ) -> Workers:  # fmt: skip
        """Connect to every worker that is registered at a store.

        Args:
            address: ``HOST:PORT`` of the store that workers print when they start.
            deadline: seconds that a call may take before its worker counts as lost.
            timeout: seconds to wait for the store, and for so many workers.
            least: workers to wait for.
            device: where this rank's queries, keys and values are.
            turns: of a model rank with several batches in rotation.

        Raises:
            ValueError: for an address that is none, or a setting that can't be.
            WorkerLost: where the store, or fewer workers than ``least``, answered in time.
        """
        for name, seconds in (("deadline", deadline), ("timeout", timeout)):
            if not 0 < seconds < 86_400:
                raise ValueError(f"{name}: got {seconds}, expected seconds, more than 0 and at most a day")
        until = time.monotonic() + timeout
        try:
            store = join_store(address, timeout)
            found = workers(store)
            while len(found) < least and time.monotonic() < until:
                time.sleep(0.05)
                found = workers(store)
        except Lost as error:
            raise WorkerLost(f"store {address}", (), str(error)) from error
        wait = max(1.0, min(deadline, until - time.monotonic()))
        enter = functools.partial(_enter, store, device=torch.device(device), wait=wait, deadline=deadline)
        with ThreadPoolExecutor(max(1, len(found))) as knocking:  # one that is gone must not keep the others waiting
            entered = list(knocking.map(enter, sorted(found.items())))
        joined = cls([x for x in entered if isinstance(x, Member)], turns)
        joined.absent = [x for x in entered if isinstance(x, str)]
        if len(joined.members) < least:
            joined.close()
            reason = (
                f"got {len(joined.members)} workers, expected {least} or more within {timeout:g} s; start them first"
            )
            raise WorkerLost(f"store {address}", (), "; ".join([reason, *joined.absent]))
        return joined

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> dict[int, Member]:
        """Those that were not lost."""
        return {number: member for number, member in self.members.items() if member.lost is None}

    def free(self) -> dict[int, int]:
        """Bytes that each living worker that is not about to leave has free, after asking it."""
        found = {}
        for number, member in self.alive.items():
            if member.leaving:  # and perhaps gone, as it should
                continue
            try:
                status = self.status_of(member)
            except WorkerLost:
                if member.holds:
                    raise
                continue  # nothing is lost with it
            if not member.leaving:
                found[number] = int(status["free"])
        return found

    def status_of(self, member: Member) -> dict[str, Any]:
        """What a worker says of itself: bytes free and in all, sequences' shards, connections, busy seconds."""
        return member.told(Kind.STATUS)

    def close(self) -> None:
        """Leave the workers, which free what they kept for this rank. Never raises, never waits."""
        for member in self.members.values():
            if member.lost is None:
                try:
                    member.send(Kind.BYE)
                except WorkerLost:
                    continue
            member.channel.close()


def _enter(
    store: dist.Store, registered: tuple[int, dict[str, Any]], *, device: torch.device, wait: float, deadline: float
) -> Member | str:  # fmt: skip
    """A connection to a registered worker, or why there is none."""
    number, info = registered
    try:
        link = knock(store, number, wait, device)
        member = Member(number, info, Channel(link, limit=int(info["limit"]), deadline=deadline))
        member.ask(Kind.HELLO, text={})
    except (Lost, WorkerLost, ValueError, KeyError, TypeError) as error:
        return f"worker {number}: {error}"
    return member
