"""Movement between ranks: worlds, exchanges of shards, agreement, and the byte meter."""

from .agreement import agree
from .exchange import DirectExchange, Exchange, GatherExchange, KeyValues, RingExchange
from .heads import Dealt, to_heads, to_tokens
from .loopback import run_loopback
from .meter import KINDS, Meter, Traffic
from .process_group import Group, ProcessGroupWorld, connect
from .strict import StrictWorld
from .world import SingleRank, SubWorld, Transfer, World

__all__ = [
    "KINDS",
    "Dealt",
    "DirectExchange",
    "Exchange",
    "GatherExchange",
    "Group",
    "KeyValues",
    "Meter",
    "ProcessGroupWorld",
    "RingExchange",
    "SingleRank",
    "StrictWorld",
    "SubWorld",
    "Traffic",
    "Transfer",
    "World",
    "agree",
    "connect",
    "run_loopback",
    "to_heads",
    "to_tokens",
]
