"""An attention worker: it lets model ranks in, and serves each in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from .budget import Budget
from .channel import LARGEST, Channel, Lost
from .frames import FrameError, Kind
from .meeting import Porch
from .session import Common, Session

CONNECTIONS, LEASE, MEMORY_SHARE = 64, 86_400.0, 0.8
_POLL = 0.02


class Worker:
    """Holds keys and values of many sequences, and attends to them for model ranks.

    Args:
        store: where ranks find it; several workers may share it.
        memory: bytes for keys and values.
        name: by which messages call it.
        device: where keys and values are, and attention is computed.
        threads: CPU threads of each connection's computation; None: PyTorch's setting.
        limit: bytes of a frame's payload, at most.
        deadline: seconds that the rest of a call may take to arrive once it has begun.
        lease: seconds that a connection may be silent; then what it kept is freed.
        connections: at once, at most.
        report: called with a line when a rank comes, goes, or sends what is no frame.
    """

    def __init__(
        self, store: dist.Store, *, memory: int, name: str = "", device: torch.device | str = "cpu",
        threads: int | None = None, limit: int = LARGEST, deadline: float = 30.0, lease: float = LEASE,
        connections: int = CONNECTIONS, report: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.common = Common(Budget(memory), torch.device(device))
        self._porch = Porch(store, self.common.device)
        self._info = {"name": name, "limit": limit, "memory": memory, "device": self.common.device.type}
        self._threads, self._limit, self._deadline, self._lease = threads, limit, deadline, lease
        self._connections, self._report = connections, report
        self._stopped = threading.Event()
        self.number = -1

    def run(self) -> None:
        """Serve until :meth:`stop`, or until after :meth:`leave` nobody keeps anything here any more.

        Goes on serving those who are here where the store is gone: nobody else can come then.
        """
        self.number = self._porch.register(self._info)
        self._report(f"worker {self.number} has {self.common.budget.total / 2**30:.1f} GiB for keys and values")
        open_door = True
        while not self._stopped.wait(_POLL):
            if self.common.leaving and open_door:
                open_door = False
                with contextlib.suppress(Lost):
                    self._porch.leave()
            if self.common.leaving and self.is_empty:
                break
            if not open_door:
                if not self.common.leaving and not self.common.sessions:
                    raise Lost("the store is gone, and so are those who had come before")
                continue
            try:
                for caller in self._porch.waiting():
                    threading.Thread(target=self._serve, args=(caller,), name=f"caller {caller}", daemon=True).start()
            except Lost as error:
                open_door = False
                self._report(f"no new ranks can come: {error}")
        for session in list(self.common.sessions):
            session.end()

    def leave(self) -> None:
        """Let nobody in any more, and ask those who are here to take their shards elsewhere."""
        self.common.leaving = True

    @property
    def is_empty(self) -> bool:
        """Whether nobody keeps anything here."""
        return not any(session.shards for session in list(self.common.sessions))

    def stop(self) -> None:
        """End :meth:`run` soon; connections are closed."""
        self._stopped.set()

    def _serve(self, caller: int) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # each thread has its own number
        try:
            link = self._porch.let_in(caller)
        except (Lost, FrameError) as error:
            self._report(f"caller {caller} did not come in: {error}")
            return
        channel = Channel(link, limit=self._limit, deadline=self._deadline, ahead=2)
        if len(self.common.sessions) >= self._connections:
            with contextlib.suppress(Lost, FrameError):
                channel.receive()
                text = {"error": f"{self._connections} connections are open, the most that it may have"}
                channel.send(Kind.REFUSED, text=text)
                channel.flush()
            channel.close()
            self._report(f"caller {caller} was turned away: {self._connections} connections are open, the most")
            return
        session, began = Session(channel, self.common), time.monotonic()
        self.common.sessions.add(session)
        self._report(f"caller {caller} is here")
        try:
            session.serve(self._lease)
            ending = "left"
        except (Lost, FrameError) as error:
            ending = f"is gone: {error}"
        except Exception as error:  # whatever it is, others are served
            ending = f"was dropped, for a fault of this worker: {type(error).__name__}: {error}"
        finally:
            session.end()
            self.common.sessions.discard(session)
        self._report(f"caller {caller} {ending}, after {time.monotonic() - began:.0f} s")
