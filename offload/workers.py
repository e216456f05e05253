"""Attention workers as a model rank sees them: connections, memory, and turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .channel import Channel, Frame, Lost
from .dialect import LEAVING, ROSTERS
from .errors import WorkerLost, WorkerRefused
from .frames import FrameError, Kind
from .meeting import join_store, knock, workers

DEADLINE = 30.0
WAIT = 60.0


class Turns:
    """Batches that compute one at a time on a model rank: while one waits for its workers, another computes.

    Each batch has a thread of its own, which computes inside :meth:`mine`, and its own :class:`Workers`.
    """

    def __init__(self, *, keeps_random_state: bool = False) -> None:
        """``keeps_random_state``: each thread samples as if it were alone with PyTorch's CPU generator."""
        self._lock, self._keeps = threading.Lock(), keeps_random_state
        self.busy = 0.0
        self._since = 0.0

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
        """This thread waits for something; others may compute meanwhile."""
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
        self._since = time.perf_counter()

    def _end(self) -> None:
        self.busy += time.perf_counter() - self._since
        self._lock.release()


class Member:
    """One worker, and the connection to it."""

    def __init__(self, number: int, info: dict[str, Any], channel: Channel, turns: Turns | None) -> None:
        self.number, self.info, self.channel, self._turns = number, info, channel, turns
        self.owed = 0  # replies that are still to come
        self.holds: set[int] = set()  # sequences
        self.lost: str | None = None
        self.leaving = False
        self.next_roster = self.next_shard = 0
        self._rosters: dict[object, int] = {}

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
            if self._turns is None:
                frame = self.channel.receive(deadline)
            else:
                with self._turns.away():
                    frame = self.channel.receive(deadline)
            text = frame.text() if frame.header.kind is Kind.REFUSED else None
        except (Lost, FrameError) as error:
            raise self._gone(error) from error
        self.owed -= 1
        self.leaving |= bool(frame.header.flags & LEAVING)
        if text is not None:
            raise WorkerRefused(f"attention worker {self.name}: {text.get('error', 'refused')}")
        return frame

    def ask(self, kind: Kind, *tensors: Tensor, **fields: Any) -> Frame:
        """Send a frame and wait for its answer."""
        self.send(kind, *tensors, replies=True, **fields)
        return self.reply()

    def answer(self, kind: Kind, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The next answer's tensors, views until the second-next answer; one of another kind or size is a loss."""
        frame = self.reply()
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
            self._rosters[key] = self.next_roster
            self.send(Kind.ROSTER, text={"shards": shards, "counts": counts}, roster=self.next_roster)
            self.next_roster += 1
        return self._rosters[key]

    def drain(self) -> None:
        """Take in the answers that nobody waits for any more."""
        while self.owed:
            try:
                self.reply()
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
    """

    def __init__(self, members: list[Member], turns: Turns | None) -> None:
        self.members, self.turns = {member.number: member for member in members}, turns

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
        except Lost as error:
            raise WorkerLost(f"store {address}", (), str(error)) from error
        found = workers(store)
        while len(found) < least and time.monotonic() < until:
            time.sleep(0.05)
            found = workers(store)
        members, absent = list[Member](), list[str]()
        for number, info in sorted(found.items()):
            try:
                link = knock(store, number, max(1.0, until - time.monotonic()), torch.device(device))
                channel = Channel(link, limit=int(info["limit"]), deadline=deadline)
                members.append(Member(number, info, channel, turns))
                members[-1].ask(Kind.HELLO, text={"dialect": 1})
            except (Lost, FrameError, WorkerLost) as error:
                members = [x for x in members if x.number != number]
                absent.append(f"{number}: {error}")
        joined = cls(members, turns)
        if len(members) < least:
            joined.close()
            reason = f"got {len(members)} workers within {timeout:g} s, expected {least} or more; start them first"
            raise WorkerLost(f"store {address}", (), "; ".join([reason, *absent]))
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
            status = self.status_of(member)
            if not member.leaving:
                found[number] = int(status["free"])
        return found

    def status_of(self, member: Member) -> dict[str, Any]:
        """What a worker says of itself: bytes free and in all, sequences' shards, connections, busy seconds."""
        return member.ask(Kind.STATUS).text()

    def close(self) -> None:
        """Leave the workers, which free what they kept for this rank. Never raises, never waits."""
        for member in self.members.values():
            if member.lost is None:
                try:
                    member.send(Kind.BYE)
                except WorkerLost:
                    continue
            member.channel.close()
