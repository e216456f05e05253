"""Attention offload: KV caches, and the attention over them, on workers rich in memory; weights stay on model ranks."""

from .cache import OffloadedCache
from .errors import NoRoom, WorkerLost, WorkerRefused
from .placement import Ledger, Placement
from .serving import Worker
from .workers import Turns, Workers

__all__ = [
    "Ledger",
    "NoRoom",
    "OffloadedCache",
    "Placement",
    "Turns",
    "Worker",
    "WorkerLost",
    "WorkerRefused",
    "Workers",
]
