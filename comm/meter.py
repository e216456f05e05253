"""The byte meter: what a rank puts on the wire, by kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

_ATTENTION = ("kv", "grad", "trade", "out", "lse", "dout", "dlse", "q", "partial", "dq")
KINDS = (*_ATTENTION, "gather", "reduce", "agree", "probe")
"""What seqpar sends: K and V, their gradients, heads for tokens and what comes back; queries, partial results and the
gradient of queries; and all else."""


class Traffic(NamedTuple):
    """Calls (messages of point-to-point transfers, or collectives) and the payload bytes that this rank sent."""

    calls: int
    bytes: int


@dataclass
class Meter:
    """Payload that this rank sent since :meth:`reset`, by kind, one of ``KINDS``.

    A collective counts as what its peers receive from this rank: ``world - 1`` times an all-gather's input.
    """

    by_kind: dict[str, Traffic] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Payload bytes of every kind."""
        return sum(traffic.bytes for traffic in self.by_kind.values())

    @property
    def calls(self) -> int:
        """Calls of every kind."""
        return sum(traffic.calls for traffic in self.by_kind.values())

    def add(self, kind: str, calls: int, num_bytes: int) -> None:
        """Count ``calls`` more calls with ``num_bytes`` in all."""
        before = self.by_kind.get(kind, Traffic(0, 0))
        self.by_kind[kind] = Traffic(before.calls + calls, before.bytes + num_bytes)

    def reset(self) -> None:
        """Start again from zero."""
        self.by_kind = {}
