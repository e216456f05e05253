"""What can go wrong with attention workers, by name."""

from __future__ import annotations

from collections.abc import Sequence


class WorkerLost(ConnectionError):
    """An attention worker is gone, or did not answer in time.

    Attributes:
        worker: its name.
        sequences: the batch rows of which it held something; empty where nothing was held yet.
        reason: what happened.
    """

    def __init__(self, worker: str, sequences: Sequence[int], reason: str) -> None:
        self.worker, self.sequences, self.reason = worker, tuple(sequences), reason
        held = f", which held part of sequences {', '.join(map(str, sequences))}" if sequences else ""
        super().__init__(f"attention worker {worker} was lost{held}: {reason}")


class WorkerRefused(ValueError):
    """An attention worker did not accept a request; the connection goes on."""


class NoRoom(ValueError):
    """No worker has the memory that is asked for."""


class NoRoomThere(WorkerRefused, NoRoom):
    """A worker lacks the memory that it had when it was asked how much it has."""
