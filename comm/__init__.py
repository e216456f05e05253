"""Movement between ranks: worlds, exchanges of shards, agreement, and the byte meter."""

from .agreement import agree
from .exchange import DirectExchange, Exchange, KeyValues, RingExchange
from .loopback import run_loopback
from .meter import Meter, Traffic
from .process_group import Group, ProcessGroupWorld, connect
from .strict import StrictWorld
from .world import SingleRank, Transfer, World

__all__ = [
    "DirectExchange",
    "Exchange",
    "Group",
    "KeyValues",
    "Meter",
    "ProcessGroupWorld",
    "RingExchange",
    "SingleRank",
    "StrictWorld",
    "Traffic",
    "Transfer",
    "World",
    "agree",
    "connect",
    "run_loopback",
]
