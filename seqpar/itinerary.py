"""Itineraries: what one rank computes, receives and sends. Pure functions of mask, layout, schedule, world and rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from .layouts import Layout, resolve_layout
from .masks import Mask
from .parts import HeadGroup, dealt
from .positions import Positions
from .reach import Totals, busiest_rows, forward_rows, totals
from .schedules import AllGather, DoubleRing, Inner, Tree, ring_size
from .sections import Block, Seen, block_of_heads, block_of_tokens, marked_final, single_rows, wanted_rows

Travel = Literal["forward", "direct", "gather", "none"]


@dataclass(frozen=True, eq=False)
class Itinerary:
    """What one rank does in one attention call, and of the other ranks the totals.

    Attributes:
        rank: whose itinerary it is.
        layout: the global positions that each rank holds.
        groups: of KV heads, each with the parts of what they see.
        kv_heads: how many KV heads there are, where they see different keys; else None.
        blocks: in the order in which they are computed: keys of the ranks in :func:`ring_order`, or of this one and of
            all others.
        exchange: how keys travel; ``none`` where all queries come to them.
        inside: how many consecutive ranks form a ring of their own, in a ring of such rings; else all of them.
        reached: what all ranks reach, where keys travel; a direct exchange moves just the rows that are needed.
        seen: by group of heads and its parts, what all queries see, where they come to the keys; else nothing.
    """

    rank: int
    layout: Layout
    groups: tuple[HeadGroup, ...]
    kv_heads: int | None
    blocks: tuple[Block, ...]
    exchange: Travel
    inside: int
    reached: Totals | None
    seen: list[list[Seen]]

    @cached_property
    def pairs(self) -> Tensor:
        """See :class:`Totals`; of each rank's keys, where all queries come to them."""
        if self.exchange != "none":
            return self.totals.pairs
        held = enumerate(self.layout.keys)
        return torch.tensor([block_of_tokens(r, keys, self.groups, self.seen, self.kv_heads).pairs for r, keys in held])

    @property
    def totals(self) -> Totals:
        """What all ranks reach."""
        assert self.reached is not None, "queries come to all keys"
        return self.reached

    @property
    def needed(self) -> Tensor:
        """See :class:`Totals`."""
        return self.totals.needed

    @property
    def single(self) -> bool:
        """Whether what travels are rows of one head each: those that each head needs."""
        return self.exchange == "direct" and self.kv_heads is not None

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
        assert gathered is not None, "whole rows are gathered"
        shards = [keys.tensor if rank != self.rank else keys.tensor[:0] for rank, keys in enumerate(self.layout.keys)]
        return [gathered.count_below(shard) for shard in shards]

    @cached_property
    def sent_rows(self) -> list[Tensor | None]:
        """For a direct exchange, which of this rank's rows each rank needs: local indices, None for all of them.

        Rows of one head each are counted token by token.
        """
        rows: list[Tensor | None] = []
        for reader in range(self.world):
            if self.kv_heads is not None:
                wanted = wanted_rows(self.groups, self.totals, reader, self.keys)
                rows.append(single_rows(wanted, self.keys))
                continue
            needed = self.keys.within(self.totals.seen_by(reader))
            rows.append(None if len(needed) == len(self.keys) else self.keys.count_below(needed.tensor))
        return rows

    def messages(self, rank: int, *, grads: bool) -> list[int]:
        """The rows of each message that ``rank`` sends in one pass: K and V, or their gradients on the way home."""
        others = [(rank + step) % self.world for step in range(1, self.world)]
        if self.exchange == "none":
            return []
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
    mask: Mask,
    layout: str | Layout,
    schedule: Inner | Tree,
    length: int,
    kv_length: int,
    world: int,
    rank: int,
    kv_heads: int | None = None,
    mine: range | None = None,
) -> Itinerary:
    """Work out a rank's itinerary; ValueError where mask and layout do not fit the lengths.

    ``kv_heads`` matters where heads see different keys, and then ``mine``: which of them this rank has (None: all).

    It looks at each of this rank's queries once per block, and at few of the others'. The last few itineraries are
    kept: every layer and every plan of the same batch shares one.
    """
    mask.check(length, kv_length, kv_heads)
    replicated = isinstance(schedule, Tree) and schedule.replicated
    layout = resolve_layout(layout, mask, length, kv_length, world, kv_heads, replicated)
    mine = range(kv_heads or 0) if mine is None else mine
    count = len(mine) if mask.by_head else None
    groups = dealt(mask.groups(kv_heads), mine) if mask.by_head else mask.groups(None)
    queries = torch.arange(length) if isinstance(schedule, Tree) else layout.queries[rank].tensor
    seen = [[Seen.of(part, queries, length, kv_length) for part in g.parts] for g in groups]
    if isinstance(schedule, Tree):
        blocks = marked_final([block_of_tokens(rank, layout.keys[rank], groups, seen, count)], len(groups))
        return Itinerary(rank, layout, groups, count, blocks, "none", world, None, seen)
    reached = reach_of(groups, layout, length, kv_length)
    exchange = _choose_exchange(schedule, reached.needed, layout.keys, 1 if count is None else count)
    inside = ring_size(schedule, world)

    found = []
    for source, keys in _arrivals(exchange, layout.keys, ring_order(rank, world, inside)):
        if exchange != "direct" or source == rank:
            found.append(block_of_tokens(source, keys, groups, seen, count))
        elif count is None:
            found.append(block_of_tokens(source, keys.within(reached.seen_by(rank)), groups, seen, count))
        else:
            assert source is not None, "keys are sent directly by one rank each"
            wanted = wanted_rows(groups, reached, rank, keys)
            found.append(block_of_heads(source, keys, wanted, groups, seen))
    return Itinerary(rank, layout, groups, count, marked_final(found, len(groups)), exchange, inside, reached, [])


@lru_cache(maxsize=32)
def reach_of(groups: tuple[HeadGroup, ...], layout: Layout, length: int, kv_length: int) -> Totals:
    """Of all ranks the keys they reach, their pairs, and the rows they need of each other, however those travel."""
    return totals(groups, layout.queries, layout.keys, length, kv_length)


def ring_order(rank: int, world: int, inside: int) -> list[int]:
    """Whose keys come by a rank: around its own ring of ``inside`` ranks, backwards, then around the one before."""
    ring, place = divmod(rank, inside)
    rings = [(ring - step) % (world // inside) for step in range(world // inside)]
    return [r * inside + (place - step) % inside for r in rings for step in range(inside)]


def _arrivals(
    exchange: Travel, held: tuple[Positions, ...], order: list[int]
) -> Iterator[tuple[int | None, Positions]]:
    """Whose keys a rank computes with in each step, and which they are before any are left out."""
    rank, *others = order
    yield rank, held[rank]
    if exchange == "gather":
        if others:
            gathered = torch.ones(sum(map(len, held)), dtype=torch.bool)
            gathered[held[rank].tensor] = False
            yield None, Positions.of(gathered.nonzero().squeeze(1))
        return
    for source in others:
        yield source, held[source]


def _choose_exchange(schedule: Inner, needed: Tensor, keys: tuple[Positions, ...], heads: int) -> Travel:
    """``heads``: to a row of a shard that is passed on; ``needed`` counts each head's where they differ."""
    if isinstance(schedule, AllGather):
        return "gather"
    if isinstance(schedule, DoubleRing):
        return "forward"
    if schedule.exchange != "auto":
        return schedule.exchange
    if len(keys) <= 2:
        return "direct"
    return "direct" if busiest_rows(needed) < heads * busiest_rows(forward_rows(keys)) else "forward"
