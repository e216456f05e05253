"""The launcher of `seqpar attention-worker`: it serves the store, so that no worker's end takes that away."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from seqpar.offload.channel import Lost
from seqpar.offload.meeting import Hosted, host_store, strike_out

from .attention_worker import Meeting, device_of, join, memory_of, new_launch, say_where, tell
from .attention_worker_config import AttentionWorkerConfig
from .errors import BAD_INPUT, FAILED
from .spawn import Place, end, start

_POLL = 0.05
_GIB = 2**30


def run_workers(config: AttentionWorkerConfig, argv: Sequence[str]) -> int:
    """Run the workers of these options, and return their exit code.

    One that dies leaves the others alone. A first SIGTERM goes on to them, a second or Ctrl-C ends them. None outlives
    this call, nor the process that makes it.
    """
    with contextlib.ExitStack() as stack:
        hosted: Hosted | None = stack.enter_context(host_store(config.listen)) if config.listen else None
        address = hosted.address if hosted else str(config.store)
        store = hosted.store if hosted else join(address)
        meeting = Meeting(store, address, new_launch(store))
        signals = stack.enter_context(_signals())
        memory = _memory_each(config)
        options = ["attention-worker", *argv, f"--memory={memory / _GIB!r}"]
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(config.nproc):
                workers.append(start(rank, config.nproc, f"{address}#{meeting.launch}", options))
            return _Watch(workers, meeting, memory, signals).until_all_end()
        finally:
            end(workers)


def _memory_each(config: AttentionWorkerConfig) -> int:
    """Worked out once: those that start later would see less memory. Bytes."""
    return memory_of(config, device_of(config, Place(0, config.nproc, 0, config.nproc, "")), config.nproc)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Those that came, in order."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """Workers that run, what became of those that don't, and the signals that came."""

    def __init__(
        self, workers: list[subprocess.Popen[bytes]], meeting: Meeting, memory: int, signals: list[int]
    ) -> None:  # fmt: skip
        self._workers, self._meeting, self._memory, self._signals = workers, meeting, memory, signals
        self._numbers: list[int | None] = [None] * len(workers)
        self._ended: set[int] = set()
        self._is_ready = False
        self._passed_on = 0
        self._code = 0

    def until_all_end(self) -> int:
        """The exit code: of a worker that never got ready, or whether any failed."""
        while len(self._ended) < len(self._workers):
            self._pass_on()
            if not self._is_ready and not self._signals:
                self._look_who_is_ready()
            for rank, worker in enumerate(self._workers):
                if rank not in self._ended and worker.poll() is not None:
                    self._ended.add(rank)
                    self._say_how(rank, worker.returncode)
                    if worker.returncode and not self._is_ready and not self._signals:
                        return BAD_INPUT if worker.returncode == BAD_INPUT else FAILED
            time.sleep(_POLL)
        return self._code

    def _pass_on(self) -> None:
        for number in self._signals[self._passed_on : 2]:
            self._passed_on += 1
            for worker in self._workers:
                if worker.poll() is None:
                    worker.send_signal(number)
            if self._passed_on > 1 or number == signal.SIGINT:
                self._passed_on = 2
                self._code = 128 + number
                end(self._workers)

    def _look_who_is_ready(self) -> None:
        self._numbers = [self._meeting.number(rank) for rank in range(len(self._workers))]
        self._is_ready = None not in self._numbers
        if self._is_ready:
            say_where(self._meeting.address, len(self._workers), self._memory)

    def _say_how(self, rank: int, code: int) -> None:
        number = self._numbers[rank]
        if number is not None:
            with contextlib.suppress(Lost):  # of a store elsewhere
                strike_out(self._meeting.store, number)  # one that was killed could not
        if self._passed_on > 1 or (code == -signal.SIGTERM and self._signals):
            return  # it was told to
        if code:
            self._code = FAILED
        name = f"worker {number}" if number is not None else f"process {rank}"
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}" if code else "has left"
        left = len(self._workers) - len(self._ended)
        others = f"{left} of {len(self._workers)} go on" if self._is_ready and left else "none is left"
        if not self._is_ready:
            others = "the others were stopped"
        tell(f"{name} {how}; {others}")
