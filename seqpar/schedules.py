"""Schedules: how shards travel. They are data; the loop that follows them is in :mod:`seqpar.ring`."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from .rates import Rates

Route = Literal["auto", "forward", "direct"]
GradWire = Literal["fp32", "bf16"]
Merge = Literal["auto", "gather", "scatter"]


def _check_options(schedule: object, **allowed: tuple[str, ...]) -> None:
    for name, values in allowed.items():
        if (got := getattr(schedule, name)) not in values:
            kind = type(schedule).__name__
            raise ValueError(f"{kind}({name}=): got {got!r}, expected one of {', '.join(values)}")


def _check_degree(schedule: DoubleRing | Ulysses | Tree) -> None:
    degree = schedule.degree
    if not isinstance(degree, Integral) or isinstance(degree, bool) or degree < 1:
        raise ValueError(f"{type(schedule).__name__}(degree=): got {degree!r}, expected a positive number of ranks")


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
        _check_options(self, exchange=get_args(Route), grad_wire=get_args(GradWire))


@dataclass(frozen=True)
class DoubleRing:
    """Rings inside a ring: shards go around the ranks of a node while the next node's are on their way here.

    The slow links between nodes carry a shard per round of the fast ones inside, all of them at once (LoongTrain, Gu et
    al. 2024, section 4.4).

    Args:
        degree: how many consecutive ranks form an inner ring.
        grad_wire: the dtype in which dK and dV travel; they are added in fp32 in any case. fp64 stays fp64.
    """

    degree: int
    grad_wire: GradWire = "fp32"

    def __post_init__(self) -> None:
        _check_options(self, grad_wire=get_args(GradWire))
        _check_degree(self)


@dataclass(frozen=True)
class AllGather:
    """Every rank's K and V come to every rank at once, while it computes with its own; gradients go back likewise.

    Two kernel calls whatever the number of ranks, and as many bytes as the ring's; a rank holds all keys at once
    (as Llama 3 was trained, Grattafiori et al. 2024, section 3.3.2).

    Args:
        grad_wire: the dtype in which dK and dV travel; they are added in fp32 in any case. fp64 stays fp64.
    """

    grad_wire: GradWire = "fp32"

    def __post_init__(self) -> None:
        _check_options(self, grad_wire=get_args(GradWire))


Inner = Ring | DoubleRing | AllGather


@dataclass(frozen=True)
class Ulysses:
    """Ranks trade tokens for heads, attend to all their tokens, and trade back (DeepSpeed Ulysses, Jacobs et al. 2023).

    Any number of heads: they are dealt in order, unevenly if need be, and KV heads go to every rank whose query heads
    read them.

    Args:
        inner: how those who trade attend together with other such groups.
        degree: how many consecutive ranks trade with each other; None for all of the group.
    """

    inner: Inner = Ring()
    degree: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Inner):
            raise ValueError(f"Ulysses(inner=): got {self.inner!r}, expected a seqpar.Ring, DoubleRing or AllGather")
        if self.degree is not None:
            _check_degree(self)


@dataclass(frozen=True)
class Tree:
    """Keys and values stay where they are: queries meet them there, and partial results are merged.

    For few queries over many keys: decoding, verifying drafts, appending to a long context, attention from a few
    latents (Tree Attention, Shyam et al. 2024, whose three collectives are one here).

    Args:
        queries: ``replicated``: every rank holds all queries, and gets all of their output. ``sharded``: ranks hold
            theirs as in a ring; they are gathered, and each rank gets the merged output of its own.
        merge: of replicated queries. ``gather`` sends whole partial results to every rank, in one call; ``scatter``
            deals their heads to ranks, which merge theirs and gather the result; ``auto`` is what costs less.
        degree: of replicated queries, how many consecutive ranks merge among themselves first, being in one node.
    """

    queries: Literal["replicated", "sharded"] = "replicated"
    merge: Merge = "auto"
    degree: int | None = None

    def __post_init__(self) -> None:
        _check_options(self, queries=("replicated", "sharded"), merge=get_args(Merge))
        if self.degree is not None:
            _check_degree(self)
        if self.queries == "sharded" and (self.merge != "auto" or self.degree is not None):
            raise ValueError(
                f"Tree(queries='sharded'): got merge={self.merge!r}, degree={self.degree!r}, expected neither: each "
                "rank merges its own queries; leave them out"
            )

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all queries."""
        return self.queries == "replicated"


Schedule = Inner | Ulysses | Tree


@dataclass(frozen=True)
class Auto:
    """Whatever a cost model finds fastest for the batch: for its mask, heads and lengths on this machine.

    ``plan.explain()`` prints what it compared, ``plan.schedule`` is what it chose: give that to later plans to pin it.

    Args:
        rates: of the machine; measured once per group, by a short probe, where none are given.
        memory: bytes per rank and batch row that attention may hold besides its inputs, output and gradients.
    """

    rates: Rates | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.rates is not None and not isinstance(self.rates, Rates):
            raise ValueError(f"Auto(rates=): got {self.rates!r}, expected a seqpar.Rates(...), or None to measure them")
        if self.memory is not None and (not isinstance(self.memory, Integral) or self.memory < 0):
            raise ValueError(f"Auto(memory=): got {self.memory!r}, expected a number of bytes, or None for no limit")


_NAMED: dict[str, Schedule | Auto] = {
    "ring": Ring(),
    "allgather": AllGather(),
    "ulysses": Ulysses(),
    "tree": Tree(),
    "auto": Auto(),
}
_ON_A_MESH: dict[str, type[DoubleRing] | type[Ulysses]] = {"double_ring": DoubleRing, "hybrid": Ulysses}


def heads_degree(schedule: Schedule, world: int) -> int:
    """How many ranks trade heads with each other: 1 where none do."""
    return _divisor(schedule, schedule.degree or world, world) if isinstance(schedule, Ulysses) else 1


def ring_size(schedule: Inner, world: int) -> int:
    """How many consecutive ranks form a ring: all of them, but for a double ring."""
    return _divisor(schedule, schedule.degree, world) if isinstance(schedule, DoubleRing) else world


def node_size(schedule: Tree, world: int) -> int:
    """How many consecutive ranks merge among themselves first: all of them, where none is said."""
    return _divisor(schedule, schedule.degree or world, world)


def _divisor(schedule: DoubleRing | Ulysses | Tree, degree: int, world: int) -> int:
    if world % degree:
        kind = type(schedule).__name__
        raise ValueError(f"{kind}(degree=): got {degree} for {world} ranks, expected a divisor of their number")
    return degree


def resolve_schedule(schedule: str | Schedule | Auto, inside: int | None = None) -> Schedule | Auto:
    """The schedule that the ``schedule=`` of :func:`seqpar.plan` means; ``inside`` is a 2-D mesh's last axis."""
    if isinstance(schedule, str) and schedule in _ON_A_MESH:
        kind = _ON_A_MESH[schedule]
        if inside is None:
            raise ValueError(
                f"schedule={schedule!r}: got a group of one axis, expected a 2-D DeviceMesh whose last axis is inside "
                f"the node; pass one, or schedule=seqpar.{kind.__name__}(degree=...)"
            )
        return kind(degree=inside)
    if schedule == "tree" and inside is not None:
        return Tree(degree=inside)
    if isinstance(schedule, str) and schedule in _NAMED:
        return _NAMED[schedule]
    if not isinstance(schedule, Schedule | Auto):
        names = ", ".join([*_NAMED, *_ON_A_MESH])
        expected = f"one of {names}, or a seqpar.Ring, DoubleRing, AllGather, Ulysses, Tree or Auto object"
        raise ValueError(f"schedule: got {schedule!r}, expected {expected}")
    return schedule
