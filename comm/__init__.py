"""Movement between ranks: worlds, exchanges of shards, agreement, and the byte meter."""

from .agreement import agree
from .exchange import DirectExchange, Exchange, GatherExchange, KeyValues, RingExchange
from .heads import Dealt, to_heads, to_tokens
from .loopback import run_loopback
from .meter import KINDS, Meter, Traffic
from .process_group import Group, ProcessGroupWorld, connect
from .reduction import Way, Wire, reduce_everywhere, reduce_to_owners, summed
from .reduction import traffic as reduction_traffic
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
    "Way",
    "Wire",
    "World",
    "agree",
    "connect",
    "reduce_everywhere",
    "reduce_to_owners",
    "reduction_traffic",
    "run_loopback",
    "summed",
    "to_heads",
    "to_tokens",
]
