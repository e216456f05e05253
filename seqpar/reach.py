"""Which keys each rank's queries reach, and how many pairs that is, without looking at every query.

Between the jumps that a mask declares, both bounds of its intervals stay, or grow by one per query. So a run of queries
at whose ends a bound differs by nothing, or by as much as the queries, is linear throughout; any other is halved. Of a
million queries a few hundred are evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import Mask
from .parts import HeadGroup, Part
from .positions import Positions, union

Segments = tuple[Tensor, ...]  # for each rank, sorted disjoint half-open intervals of global positions, [S, 2]


def reach(part: Part, queries: tuple[Positions, ...], length: int, kv_length: int) -> tuple[Segments, Tensor]:
    """Per rank, the intervals of keys that some query of it sees; and int64 ``[world]`` pairs.

    Pairs are summed over the mask's batch rows, and over heads where each has its stripes; of the intervals, which are
    the union over rows, a head then sees its stripes.
    """
    mask = part.mask
    runs = _cut_at(mask.jumps(length, kv_length), queries)
    pairs = torch.zeros(len(queries), dtype=torch.int64)
    found: list[Tensor] = []  # [reader, first key, end] of linear runs
    while len(runs):
        reader, first, count, step = runs.unbind(1)
        last = first + (count - 1) * step
        (low, high), (last_low, last_high) = _bounds(mask, first, last, length, kv_length)
        seen = (high > low) & (last_high > last_low)
        grown = last - first
        steady = _linear(low, last_low, grown) & _linear(high, last_high, grown)
        touching = (last_low == low) | (torch.minimum(high - low, last_high - last_low) >= step)
        width, last_width = high - low, last_high - last_low
        reached = list(zip(low, last_high, strict=True))
        done = steady & touching & seen
        if part.stripes is not None:
            low, high, last_low, last_high = _striped(part, low, high, last_low, last_high, length, kv_length)
            width, last_width = (high - low).sum(1), (last_high - last_low).sum(1)
            done &= (_linear(low, last_low, grown) & _linear(high, last_high, grown)).all(1)
        done = (done | (count == 1)).all(0)
        both = (width + last_width)[:, done].sum(0)
        pairs.index_add_(0, reader[done], count[done] * both // 2)
        found += [torch.stack([reader[done], a[done], b[done]], 1) for a, b in reached]
        runs = _halved(runs[~done])
    whole = torch.cat(found)
    whole = whole[whole[:, 2] > whole[:, 1]]
    whole = whole[torch.argsort(whole[:, 0] * (kv_length + 1) + whole[:, 1])]
    each = torch.bincount(whole[:, 0], minlength=len(queries)).tolist()
    return tuple(union(x[:, 1:2].T, x[:, 2:].T.cummax(1).values) for x in whole.split(each)), pairs


@dataclass(frozen=True, eq=False)
class Totals:
    """Of all ranks, whatever they exchange.

    Attributes:
        segments: by group of heads and its parts, each rank's keys that some query of it sees.
        striped: likewise, the boundaries of documents by which its stripes are counted; None where it has none, or
            where batch rows have their own: a rank then needs every key between.
        pairs: int64 ``[world]``: each rank's query-key pairs, summed over the mask's batch rows, and over KV heads
            where they see different keys.
        needed: int64 ``[world, world]``, ``needed[reader, owner]``: how many of the owner's rows the reader's queries
            see; rows of all heads, or of one each where heads see different keys.
    """

    segments: tuple[tuple[Segments, ...], ...]
    striped: tuple[tuple[tuple[int, ...] | None, ...], ...]
    pairs: Tensor
    needed: Tensor

    def seen_by(self, reader: int) -> Tensor:
        """The keys that some query of a rank sees, ``[S, 2]``, where they are the same for all heads."""
        (parts,) = self.segments
        (seen,) = joined([theirs[reader : reader + 1] for theirs in parts])
        return seen


def totals(
    groups: tuple[HeadGroup, ...],
    queries: tuple[Positions, ...],
    keys: tuple[Positions, ...],
    length: int,
    kv_length: int,
) -> Totals:
    """What each rank's heads reach, and how much that is."""
    pairs = torch.zeros(len(queries), dtype=torch.int64)
    needed = torch.zeros(len(queries), len(keys), dtype=torch.int64)
    segments = []
    for group in groups:
        found = [reach(part, queries, length, kv_length) for part in group.parts]
        for part, (_, counted) in zip(group.parts, found, strict=True):
            pairs += counted * (1 if group.heads is None or part.stripes else len(group.heads))
        segments.append(tuple(theirs for theirs, _ in found))
        needed += rows_needed(keys, group, segments[-1], length, kv_length)
    striped = tuple(tuple(striped_keys(part, length, kv_length) for part in group.parts) for group in groups)
    return Totals(tuple(segments), striped, pairs, needed)


def rows_needed(
    keys: tuple[Positions, ...], group: HeadGroup, segments: tuple[Segments, ...], length: int, kv_length: int
) -> Tensor:
    """``[reader, owner]``: how many of the owner's keys the reader's queries see, by ``segments`` of the group's parts.

    Summed over the group's heads, each with its stripes; rows of all heads where the group is of all.
    """
    plain: list[Segments] = []
    in_stripes: list[Segments] = []
    stripes, document_keys = None, None
    for part, theirs in zip(group.parts, segments, strict=True):
        striped_by = striped_keys(part, length, kv_length)
        if striped_by is None:
            plain.append(theirs)
        else:  # all of a group's are the same
            stripes, document_keys = part.stripes, striped_by
            in_stripes.append(theirs)
    needed = torch.zeros(len(segments[0]), len(keys), dtype=torch.int64)
    heads = 1 if group.heads is None else len(group.heads)
    if plain:
        reader, low, high = _flat(joined(plain))
        for owner, positions in enumerate(keys):
            counts = positions.count_below(high) - positions.count_below(low)
            needed[:, owner].index_add_(0, reader, counts * heads)
    if stripes is not None and document_keys is not None:
        besides = joined(in_stripes)
        if plain:
            besides = tuple(without(a, b) for a, b in zip(besides, joined(plain), strict=True))
        reader, low, high = _flat(besides)
        ends = torch.stack([low, high])
        for owner, positions in enumerate(keys):
            below = stripes.count_below(positions, ends, document_keys)
            needed[:, owner].index_add_(0, reader, (below[:, 1] - below[:, 0]).sum(0))
    return needed


def forward_rows(keys: tuple[Positions, ...]) -> Tensor:
    """``[reader, owner]`` of a forward ring: every rank gets everything."""
    return torch.tensor([len(positions) for positions in keys]).expand(len(keys), -1)


def busiest_rows(moved: Tensor) -> int:
    """The most rows that any rank sends or receives, of ``moved [reader, owner]``."""
    travelling = moved - moved.diagonal().diag()
    return int(torch.maximum(travelling.sum(0), travelling.sum(1)).max())


def striped_keys(part: Part, length: int, kv_length: int) -> tuple[int, ...] | None:
    """The documents' key boundaries by which stripes are counted, where all batch rows have the same; else None."""
    if part.stripes is None:
        return None
    rows = set(part.mask.documents_within(length, kv_length).keys)
    return rows.pop() if len(rows) == 1 else None


def joined(segments: list[Segments]) -> Segments:
    """The union, rank by rank."""
    if len(segments) == 1:
        return segments[0]
    found = []
    for parts in zip(*segments, strict=True):
        both = torch.cat(parts)
        both = both[both[:, 0].argsort()]
        found.append(union(both[:, :1].T, both[:, 1:].T.cummax(1).values))
    return tuple(found)


def without(segments: Tensor, others: Tensor) -> Tensor:
    """What of sorted disjoint intervals ``[S, 2]`` lies in none of the others."""
    cuts = torch.cat([segments.flatten(), others.flatten()]).unique()
    low, high = cuts[:-1], cuts[1:]
    kept = inside(segments, low) & ~inside(others, low)
    return torch.stack([low[kept], high[kept]], 1)


def inside(segments: Tensor, positions: Tensor) -> Tensor:
    """Which positions lie in one of the sorted disjoint intervals ``[S, 2]``."""
    return torch.searchsorted(segments.flatten(), positions, right=True) % 2 == 1


def _flat(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Whose each interval is, where it begins and where it ends."""
    reader = torch.repeat_interleave(torch.tensor([len(s) for s in segments]))
    low, high = torch.cat(segments).t().contiguous()
    return reader, low, high


def _linear(first: Tensor, last: Tensor, grown: Tensor) -> Tensor:
    """Whether a bound that never falls, nor grows by more than 1 a query, stays or grows steadily between two."""
    return (last == first) | (last - first == grown)


def _striped(
    part: Part, low: Tensor, high: Tensor, last_low: Tensor, last_high: Tensor, length: int, kv_length: int
) -> Tensor:
    """The bounds ``[rows, runs]`` counted in each head's stripes: ``[4, rows, heads, runs]``."""
    assert part.stripes is not None, "asked of stripes alone"
    every = Positions.runs([(0, kv_length, 1)])
    rows = []
    for row, document_keys in enumerate(part.mask.documents_within(length, kv_length).keys):
        bounds = torch.stack([x[row] for x in (low, high, last_low, last_high)])
        rows.append(part.stripes.count_below(every, bounds, document_keys).transpose(0, 1))
    return torch.stack(rows, 1)


def _cut_at(jumps: Tensor, queries: tuple[Positions, ...]) -> Tensor:
    """Runs of all ranks as ``[reader, first, count, step]``, cut so that a jump only ever comes first in one."""
    reader = torch.repeat_interleave(torch.tensor([len(x.starts) for x in queries]))
    start, count, step = (torch.cat([getattr(x, n) for x in queries]) for n in ("starts", "counts", "steps"))
    before = torch.searchsorted(jumps, start, right=True)
    cuts = torch.searchsorted(jumps, start + (count - 1) * step, right=True) - before
    run = torch.repeat_interleave(cuts)
    nth = torch.arange(len(run)) - (cuts.cumsum(0) - cuts)[run]
    at = -torch.div(start[run] - jumps[before[run] + nth], step[run], rounding_mode="floor")  # ceil: first at or after
    each = torch.cat([torch.arange(len(start)), run])
    longest = int(count.max()) if len(count) else 1
    begins = (each * longest + torch.cat([torch.zeros_like(start), at])).unique()  # by run, then by place
    run, place = begins.div(longest, rounding_mode="floor"), begins.remainder(longest)
    following = torch.cat([place[1:], place.new_zeros(1)])
    ends = torch.where(torch.cat([run[1:] != run[:-1], run.new_ones(1, dtype=torch.bool)]), count[run], following)
    return torch.stack([reader[run], start[run] + place * step[run], ends - place, step[run]], 1)


def _bounds(mask: Mask, first: Tensor, last: Tensor, length: int, kv_length: int) -> list[tuple[Tensor, Tensor]]:
    """``lo, hi [rows, runs]`` of each run's first query, and of its last."""
    some, place = torch.cat([first, last]).unique(return_inverse=True)
    lo, hi = mask.intervals(some, length, kv_length)
    return [(lo[:, at], hi[:, at]) for at in place.split(len(first))]


def _halved(runs: Tensor) -> Tensor:
    reader, first, count, step = runs.unbind(1)
    half = count // 2
    return torch.cat(
        [
            torch.stack([reader, first, half, step], 1),
            torch.stack([reader, first + half * step, count - half, step], 1),
        ]
    )
