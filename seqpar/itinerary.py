"""Itineraries: what one rank computes, receives and sends. Pure functions of mask, layout, schedule, world and rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from seqpar.kernels import Intervals

from .layouts import Layout, resolve_layout
from .masks import Mask
from .positions import Positions
from .reach import reach, rows_needed
from .schedules import AllGather, DoubleRing, Inner, ring_size

Travel = Literal["forward", "direct", "gather"]


@dataclass(frozen=True, eq=False)
class Block:
    """This rank's queries against the rows of one rank's keys that arrive here, or of all other ranks' (None)."""

    source: int | None
    keys: Positions
    intervals: Intervals
    pairs: int  # query-key pairs that the mask allows, summed over the mask's batch rows


@dataclass(frozen=True, eq=False)
class Itinerary:
    """What one rank does in one attention call, and of the other ranks the totals.

    Attributes:
        rank: whose itinerary it is.
        layout: the global positions that each rank holds.
        blocks: in the order in which they are computed: keys of the ranks in :func:`ring_order`, or of this one and of
            all others.
        exchange: how keys travel.
        inside: how many consecutive ranks form a ring of their own, in a ring of such rings; else all of them.
        needed: int64 ``[world, world]``, ``needed[reader, owner]``: how many of the owner's rows some query of the
            reader sees; a direct exchange moves just these.
        pairs: int64 ``[world]``: each rank's work, summed over the mask's batch rows.
        segments: each rank's needed keys as sorted disjoint global intervals ``[S, 2]``.
    """

    rank: int
    layout: Layout
    blocks: tuple[Block, ...]
    exchange: Travel
    inside: int
    needed: Tensor
    pairs: Tensor
    segments: tuple[Tensor, ...]

    @property
    def world(self) -> int:
        """The number of ranks."""
        return len(self.layout.queries)

    @property
    def queries(self) -> Positions:
        """The global positions of this rank's queries."""
        return self.layout.queries[self.rank]

    @property
    def keys(self) -> Positions:
        """The global positions of this rank's keys."""
        return self.layout.keys[self.rank]

    @cached_property
    def places(self) -> list[Tensor]:
        """Where the rows of each other rank stand among those gathered, by rank; nothing for this one."""
        gathered = self.blocks[-1].keys
        shards = [keys.tensor if rank != self.rank else keys.tensor[:0] for rank, keys in enumerate(self.layout.keys)]
        return [gathered.count_below(shard) for shard in shards]

    @cached_property
    def sent_rows(self) -> list[Tensor | None]:
        """For a direct exchange, which of this rank's rows each rank needs: local indices, None for all of them."""
        rows: list[Tensor | None] = []
        for reader in range(self.world):
            needed = self.keys.within(self.segments[reader])
            rows.append(None if len(needed) == len(self.keys) else self.keys.count_below(needed.tensor))
        return rows

    def messages(self, rank: int, *, grads: bool) -> list[int]:
        """The rows of each message that ``rank`` sends in one pass: K and V, or their gradients on the way home."""
        others = [(rank + step) % self.world for step in range(1, self.world)]
        if self.exchange == "direct":
            needed = self.needed if grads else self.needed.t()
            rows = [int(needed[rank, peer]) for peer in others]
        else:
            sources = ring_order(rank, self.world, self.inside)
            if grads:
                sources = sources[1:]  # a shard's gradient leaves after each step but the first
            elif self.exchange == "gather":
                sources = [rank] * len(others)
            else:  # what a rank computes with goes on, unless its ring ends here; and what a ring begins with
                sources = [s for n, s in enumerate(sources) if (n + 1) % self.inside] + sources[:: self.inside][:-1]
            rows = [len(self.layout.keys[source]) for source in sources]
        return [count for count in rows if count]


@lru_cache(maxsize=32)
def itinerary(
    mask: Mask, layout: str | Layout, schedule: Inner, length: int, kv_length: int, world: int, rank: int
) -> Itinerary:
    """Work out a rank's itinerary; ValueError where mask and layout do not fit the lengths.

    It looks at each of this rank's queries once per block, and at few of the others'. The last few itineraries are
    kept: every layer and every plan of the same batch shares one.
    """
    mask.check(length, kv_length)
    layout = resolve_layout(layout, mask, length, kv_length, world)
    lo, hi = mask.intervals(layout.queries[rank].tensor, length, kv_length)
    segments, pairs, needed = totals(mask, layout, length, kv_length)
    exchange = _choose_exchange(schedule, needed, layout.keys)

    blocks = []
    inside = ring_size(schedule, world)
    for source, keys in _arrivals(exchange, layout.keys, segments[rank], ring_order(rank, world, inside)):
        start, end = keys.count_below(lo), keys.count_below(hi)
        intervals = Intervals(_per_query(start), _per_query(end))
        blocks.append(Block(source, keys, intervals, pairs=int(end.sum() - start.sum())))
    return Itinerary(rank, layout, tuple(blocks), exchange, inside, needed, pairs, segments)


@lru_cache(maxsize=32)
def totals(mask: Mask, layout: Layout, length: int, kv_length: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Of all ranks the keys they reach, their pairs, and the rows they need of each other, however those travel."""
    segments, pairs = reach(mask, layout.queries, length, kv_length)
    return segments, pairs, rows_needed(layout.keys, segments)


def ring_order(rank: int, world: int, inside: int) -> list[int]:
    """Whose keys come by a rank: around its own ring of ``inside`` ranks, backwards, then around the one before."""
    ring, place = divmod(rank, inside)
    rings = [(ring - step) % (world // inside) for step in range(world // inside)]
    return [r * inside + (place - step) % inside for r in rings for step in range(inside)]


def _arrivals(
    exchange: Travel, held: tuple[Positions, ...], needed: Tensor, order: list[int]
) -> Iterator[tuple[int | None, Positions]]:
    """Whose keys a rank computes with in each step, and which of them are there."""
    rank, *others = order
    yield rank, held[rank]
    if exchange == "gather":
        if others:
            gathered = torch.ones(sum(map(len, held)), dtype=torch.bool)
            gathered[held[rank].tensor] = False
            yield None, Positions.of(gathered.nonzero().squeeze(1))
        return
    for source in others:
        yield source, held[source].within(needed) if exchange == "direct" else held[source]


def _per_query(bound: Tensor) -> Tensor:
    """``[rows, T]`` as kernels want it: int32 ``[rows, 1, T]``, the same for all heads."""
    return bound.to(torch.int32).unsqueeze(1)


def _choose_exchange(schedule: Inner, needed: Tensor, keys: tuple[Positions, ...]) -> Travel:
    if isinstance(schedule, AllGather):
        return "gather"
    if isinstance(schedule, DoubleRing):
        return "forward"
    if schedule.exchange != "auto":
        return schedule.exchange
    if len(keys) <= 2:
        return "direct"
    return "direct" if busiest_rows(needed) < busiest_rows(forward_rows(keys)) else "forward"


def forward_rows(keys: tuple[Positions, ...]) -> Tensor:
    """``[reader, owner]`` of a forward ring: every rank gets everything."""
    return torch.tensor([len(positions) for positions in keys]).expand(len(keys), -1)


def busiest_rows(moved: Tensor) -> int:
    """The most rows that any rank sends or receives, of ``moved [reader, owner]``."""
    travelling = moved - moved.diagonal().diag()
    return int(torch.maximum(travelling.sum(0), travelling.sum(1)).max())
