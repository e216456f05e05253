"""The memory that a worker gives to keys and values."""

from __future__ import annotations

import threading

from .errors import NoRoom


class Budget:
    """So many bytes, for all connections together."""

    def __init__(self, total: int) -> None:
        self.total, self._used, self._lock = total, 0, threading.Lock()

    @property
    def free(self) -> int:
        """Bytes that nobody has."""
        return self.total - self._used

    def take(self, size: int) -> None:
        """Raises NoRoom where so much is not free."""
        with self._lock:
            if size > self.free:
                raise NoRoom(
                    f"memory: got {size:,} bytes to hold, expected at most {self.free:,}, which are free of "
                    f"{self.total:,}; use more workers, or give them more --memory"
                )
            self._used += size

    def give_back(self, size: int) -> None:
        """What was taken."""
        with self._lock:
            self._used -= size
