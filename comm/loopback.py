"""Ranks that are threads of one process: nothing to launch, the same results, for tests and for trying things out."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from .world import Messages, Transfer, World

Result = TypeVar("Result")


class _Switchboard:
    """The mailboxes that the threads share."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.changed = threading.Condition()
        self.mail: dict[tuple[int, int], dict[int, Tensor]] = defaultdict(dict)
        self.posted: Counter[tuple[int, int]] = Counter()
        self.expected: Counter[tuple[int, int]] = Counter()
        self.failed: int | None = None

    def post(self, source: int, destination: int, tensor: Tensor) -> None:
        with self.changed:
            number = self.posted[source, destination]
            self.posted[source, destination] += 1
            self.mail[source, destination][number] = tensor.detach().clone()
            self.changed.notify_all()

    def expect(self, source: int, destination: int) -> int:
        """The number of the message that the next receive gets: the order is that in which receives began."""
        number = self.expected[source, destination]
        self.expected[source, destination] += 1
        return number

    def take(self, source: int, destination: int, number: int) -> Tensor:
        with self.changed:
            box = self.mail[source, destination]
            arrived = self.changed.wait_for(lambda: number in box or self.failed is not None, self.timeout)
            if number in box:
                return box.pop(number)
        reason = f"rank {self.failed} failed" if arrived else f"nothing came within {self.timeout:g} s"
        raise ConnectionError(f"loopback: rank {destination} waited for rank {source}, but {reason}")

    def fail(self, rank: int) -> None:
        with self.changed:
            self.failed = rank if self.failed is None else self.failed
            self.changed.notify_all()


class LoopbackWorld(World):
    """One of the ranks of :func:`run_loopback`."""

    def __init__(self, rank: int, size: int, switchboard: _Switchboard) -> None:
        super().__init__(rank, size)
        self._switchboard = switchboard

    def _start(self, sends: Messages, receives: Messages) -> Transfer:
        for peer, tensor in sends:
            self._switchboard.post(self.rank, peer, tensor)
        awaited = [(peer, tensor, self._switchboard.expect(peer, self.rank)) for peer, tensor in receives]

        def wait() -> None:
            for peer, tensor, number in awaited:
                arrived = self._switchboard.take(peer, self.rank, number)
                if arrived.shape != tensor.shape or arrived.dtype != tensor.dtype:
                    got, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (arrived, tensor))
                    raise ConnectionError(f"loopback: rank {self.rank} got {got} from rank {peer}, expected {expected}")
                tensor.copy_(arrived)

        return Transfer(wait)


def run_loopback(size: int, function: Callable[..., Result], *args: Any, timeout: float = 60.0) -> list[Result]:
    """Run ``function(world, *args)`` on ``size`` ranks, each a thread of this process, and return what each returned.

    The first rank to raise ends all of them, and its exception is raised here. ``timeout`` (seconds) bounds each wait.
    """
    switchboard = _Switchboard(timeout)

    def run(rank: int) -> Result:
        try:
            return function(LoopbackWorld(rank, size, switchboard), *args)
        except BaseException:
            switchboard.fail(rank)
            raise

    with ThreadPoolExecutor(size, thread_name_prefix="rank") as pool:
        ranks = [pool.submit(run, rank) for rank in range(size)]
    if switchboard.failed is not None:
        ranks[switchboard.failed].result()
    return [rank.result() for rank in ranks]
