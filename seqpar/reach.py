"""Which keys each rank's queries reach, and how many pairs that is, without looking at every query.

Between the jumps that a mask declares, both bounds of its intervals stay, or grow by one per query. So a run of queries
at whose ends a bound differs by nothing, or by as much as the queries, is linear throughout; any other is halved. Of a
million queries a few hundred are evaluated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import Mask
from .positions import Positions, union


def reach(mask: Mask, queries: tuple[Positions, ...], length: int, kv_length: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Per rank, the keys that some query of it sees, as sorted disjoint ``[S, 2]``; and int64 ``[world]`` pairs.

    Pairs are summed over the mask's batch rows, keys are the union over them.
    """
    runs = _cut_at(mask.jumps(length, kv_length), queries)
    pairs = torch.zeros(len(queries), dtype=torch.int64)
    found: list[Tensor] = []  # [reader, first key, end] of linear runs
    while len(runs):
        reader, first, count, step = runs.unbind(1)
        last = first + (count - 1) * step
        (low, high), (last_low, last_high) = _bounds(mask, first, last, length, kv_length)
        seen = (high > low) & (last_high > last_low)
        grown = last - first
        linear = ((last_low == low) | (last_low - low == grown)) & ((last_high == high) | (last_high - high == grown))
        touching = (last_low == low) | (torch.minimum(high - low, last_high - last_low) >= step)
        done = ((linear & touching & seen) | (count == 1)).all(0)
        width = (high - low + last_high - last_low)[:, done].sum(0)
        pairs.index_add_(0, reader[done], count[done] * width // 2)
        found += [torch.stack([reader[done], a[done], b[done]], 1) for a, b in zip(low, last_high, strict=True)]
        runs = _halved(runs[~done])
    whole = torch.cat(found)
    whole = whole[whole[:, 2] > whole[:, 1]]
    whole = whole[torch.argsort(whole[:, 0] * (kv_length + 1) + whole[:, 1])]
    each = torch.bincount(whole[:, 0], minlength=len(queries)).tolist()
    return tuple(union(x[:, 1:2].T, x[:, 2:].T.cummax(1).values) for x in whole.split(each)), pairs


def rows_needed(keys: tuple[Positions, ...], segments: tuple[Tensor, ...]) -> Tensor:
    """``[reader, owner]``: how many of the owner's keys lie in the reader's segments."""
    reader = torch.repeat_interleave(torch.tensor([len(s) for s in segments]))
    low, high = torch.cat(segments).t().contiguous()
    needed = torch.zeros(len(segments), len(keys), dtype=torch.int64)
    for owner, positions in enumerate(keys):
        counts = positions.count_below(high) - positions.count_below(low)
        needed[:, owner].index_add_(0, reader, counts)
    return needed


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
    begins = torch.stack([each, torch.cat([torch.zeros_like(start), at])], 1).unique(dim=0)  # by run, then by place
    run, place = begins.unbind(1)
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
