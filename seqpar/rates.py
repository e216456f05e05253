"""What a cost model needs to know of the machine: how fast a rank computes, and how fast its messages travel."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a rank computes attention, and how fast its messages travel.

    Measured by a short probe where ``schedule="auto"`` is given none (``seqpar.probing``).

    Args:
        forward, backward: FLOP/s of the local kernel: ``2(D + Dv)`` and ``2(3D + 2Dv)`` FLOP per query-key pair and
            query head.
        call, backward_call: seconds that a call of the forward kernel takes besides, and one of the backward.
        copy: bytes/s that are copied into new memory: packed, received into, added up.
        bandwidth: bytes/s that a rank sends while it receives as many.
        latency: seconds until a message of no size is there.
        overlap: how much of a transfer costs nothing while a kernel runs beside it, from 0 to 1.
        node: how many consecutive ranks are in one node; None for all of them.
        far_bandwidth, far_latency: of messages that leave the node; None for the same.
    """

    forward: float
    backward: float
    call: float
    backward_call: float
    copy: float
    bandwidth: float
    latency: float
    overlap: float = 1.0
    node: int | None = None
    far_bandwidth: float | None = None
    far_latency: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name == "node" else 0
            kind = Integral if field.name == "node" else Real
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or value < least):
                raise ValueError(f"Rates({field.name}=): got {value!r}, expected a number >= {least}")
        for name in ("forward", "backward", "copy", "bandwidth"):
            if not getattr(self, name):
                raise ValueError(f"Rates({name}=): got 0, expected more")
        if self.overlap > 1:
            raise ValueError(f"Rates(overlap=): got {self.overlap}, expected 0 .. 1")

    def transfer(self, near: tuple[int, int], far: tuple[int, int] = (0, 0)) -> float:
        """Seconds for messages inside the node and others out of it, each ``(calls, bytes)``, on links of their own."""
        inside = near[0] * self.latency + near[1] / self.bandwidth
        far_latency = self.latency if self.far_latency is None else self.far_latency
        outside = far[0] * far_latency + far[1] / (self.far_bandwidth or self.bandwidth)
        return max(inside, outside)

    def beside(self, kernel: float, transfer: float) -> float:
        """Seconds for a kernel and a transfer that run at once."""
        return max(transfer, kernel + (1 - self.overlap) * transfer)
