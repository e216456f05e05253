"""Schedules: how shards travel. They are data; the loop that follows them is in :mod:`seqpar.ring`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Route = Literal["auto", "forward", "direct"]
GradWire = Literal["fp32", "bf16"]
SCHEDULE_NAMES = ("ring",)


@dataclass(frozen=True)
class Ring:
    """Every rank's K and V pass by every rank, one after another, while it computes (Ring Attention, Liu et al. 2023).

    Args:
        exchange: ``forward`` passes every shard on whole, to the next neighbour. ``direct`` sends each rank only the
            rows that its queries need, straight from their owner. ``auto`` is direct where the busiest rank then moves
            fewer rows, and between two ranks, whose only wire is the same either way.
        grad_wire: the dtype in which dK and dV travel; they are added in fp32 in any case. fp64 stays fp64.
    """

    exchange: Route = "auto"
    grad_wire: GradWire = "fp32"

    def __post_init__(self) -> None:
        for name, allowed in (("exchange", get_args(Route)), ("grad_wire", get_args(GradWire))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Ring({name}=): got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")


def resolve_schedule(schedule: str | Ring) -> Ring:
    """The schedule that the ``schedule=`` of :func:`seqpar.plan` means."""
    if schedule == "ring":
        return Ring()
    if not isinstance(schedule, Ring):
        expected = f"one of {', '.join(SCHEDULE_NAMES)}, or a seqpar.Ring(...)"
        raise ValueError(f"schedule: got {schedule!r}, expected {expected}")
    return schedule
