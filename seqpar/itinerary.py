"""Itineraries: what one rank computes, receives and sends. Pure functions of mask, layout, schedule, world and rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from seqpar.kernels import Intervals

from .layouts import Layout, resolve_layout
from .masks import Mask
from .positions import Positions
from .reach import reach
from .schedules import Ring


@dataclass(frozen=True, eq=False)
class Block:
    """This rank's queries against the rows of one rank's keys that arrive here."""

    source: int
    keys: Positions
    intervals: Intervals
    pairs: int  # query-key pairs that the mask allows, summed over the mask's batch rows


@dataclass(frozen=True, eq=False)
class Itinerary:
    """What one rank does in one attention call, and of the other ranks the totals.

    Attributes:
        rank: whose itinerary it is.
        layout: the global positions that each rank holds.
        blocks: in the order in which they are computed: keys of ranks ``r, r - 1, r - 2, ...``.
        exchange: how keys travel.
        needed: int64 ``[world, world]``, ``needed[reader, owner]``: how many of the owner's rows some query of the
            reader sees; a direct exchange moves just these.
        pairs: int64 ``[world]``: each rank's work, summed over the mask's batch rows.
        segments: each rank's needed keys as sorted disjoint global intervals ``[S, 2]``.
    """

    rank: int
    layout: Layout
    blocks: tuple[Block, ...]
    exchange: Literal["forward", "direct"]
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
    def arriving_rows(self) -> list[int]:
        """How many rows of each rank's keys arrive here, by rank."""
        by_source = {block.source: len(block.keys) for block in self.blocks}
        return [by_source[rank] for rank in range(self.world)]

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
        rows = []
        for step in range(1, self.world):
            if self.exchange == "direct":
                reader, owner = (rank, rank - step) if grads else (rank + step, rank)
                rows.append(int(self.needed[reader % self.world, owner % self.world]))
            else:
                source = rank - step if grads else rank - step + 1
                rows.append(len(self.layout.keys[source % self.world]))
        return [count for count in rows if count]


@lru_cache(maxsize=8)
def itinerary(
    mask: Mask, layout: str | Layout, schedule: Ring, length: int, kv_length: int, world: int, rank: int
) -> Itinerary:
    """Work out a rank's itinerary; ValueError where mask and layout do not fit the lengths.

    It looks at each of this rank's queries once per block, and at few of the others'. The last few itineraries are
    kept: every layer and every plan of the same batch shares one.
    """
    mask.check(length, kv_length)
    layout = resolve_layout(layout, mask, length, kv_length, world)
    lo, hi = mask.intervals(layout.queries[rank].tensor, length, kv_length)

    segments, pairs = reach(mask, layout.queries, length, kv_length)
    needed = _rows_needed(layout.keys, segments)
    exchange = _choose_exchange(schedule, needed, layout.keys)

    blocks = []
    for step in range(world):
        source = (rank - step) % world
        keys = layout.keys[source]
        if exchange == "direct" and source != rank:
            keys = keys.within(segments[rank])
        start, end = keys.count_below(lo), keys.count_below(hi)
        intervals = Intervals(_per_query(start), _per_query(end))
        blocks.append(Block(source, keys, intervals, pairs=int(end.sum() - start.sum())))
    return Itinerary(rank, layout, tuple(blocks), exchange, needed, pairs, segments)


def _per_query(bound: Tensor) -> Tensor:
    """``[rows, T]`` as kernels want it: int32 ``[rows, 1, T]``, the same for all heads."""
    return bound.to(torch.int32).unsqueeze(1)


def _rows_needed(keys: tuple[Positions, ...], segments: tuple[Tensor, ...]) -> Tensor:
    """``[reader, owner]``: how many of the owner's keys lie in the reader's segments."""
    reader = torch.repeat_interleave(torch.tensor([len(s) for s in segments]))
    low, high = torch.cat(segments).t().contiguous()
    needed = torch.zeros(len(segments), len(keys), dtype=torch.int64)
    for owner, positions in enumerate(keys):
        counts = positions.count_below(high) - positions.count_below(low)
        needed[:, owner].index_add_(0, reader, counts)
    return needed


def _choose_exchange(schedule: Ring, needed: Tensor, keys: tuple[Positions, ...]) -> Literal["forward", "direct"]:
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
