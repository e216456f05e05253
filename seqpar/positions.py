"""Sorted sets of token positions, held as strided runs so that a million tokens cost a handful of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

_FEW_RUNS = 4  # that are quicker one after another than by a search


class Positions:
    """Strictly increasing global positions: ``start, start + step, ...`` of each run, one run after another.

    Immutable and hashable. Zigzag is two runs of step 1, striped one run of step ``world``.
    """

    def __init__(self, starts: Tensor, counts: Tensor, steps: Tensor) -> None:
        """Runs as int64 ``[R]`` tensors, in order and without overlap; empty runs are dropped."""
        kept = counts > 0
        self.starts, self.counts, self.steps = starts[kept], counts[kept], steps[kept]
        self.offsets = self.counts.cumsum(0) - self.counts

    @classmethod
    def runs(cls, runs: Iterable[tuple[int, int, int]]) -> Positions:
        """From ``(start, count, step)`` of each run."""
        table = torch.tensor(list(runs), dtype=torch.int64).view(-1, 3)
        return cls(table[:, 0], table[:, 1], table[:, 2])

    @classmethod
    def of(cls, positions: Tensor) -> Positions:
        """From the positions themselves, int64 ``[T]``, strictly increasing."""
        if not len(positions):
            return cls.runs([])
        new_run = torch.ones_like(positions, dtype=torch.bool)
        new_run[1:] = positions.diff() != 1
        first = new_run.nonzero().squeeze(1)
        counts = torch.cat([first, first.new_tensor([len(positions)])]).diff()
        return cls(positions[first], counts, torch.ones_like(counts))

    def __len__(self) -> int:
        return self._length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Positions) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)

    def __repr__(self) -> str:
        table = torch.stack([self.starts, self.counts, self.steps], 1)[:4].tolist()
        more = ", ..." if len(self.starts) > 4 else ""
        return f"Positions({len(self)}: {', '.join(f'{s}+{n}x{d}' for s, n, d in table)}{more})"

    @cached_property
    def _length(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def content(self) -> bytes:
        """The runs as bytes: equal for equal positions of equal runs."""
        return torch.stack([self.starts, self.counts, self.steps]).numpy().tobytes()

    @cached_property
    def tensor(self) -> Tensor:
        """The positions, int64 ``[T]``."""
        if len(self.starts) <= _FEW_RUNS:
            runs = zip(self.starts.tolist(), self.counts.tolist(), self.steps.tolist(), strict=True)
            return torch.cat([torch.arange(s, s + n * d, d) for s, n, d in runs] or [self.starts])
        run = torch.repeat_interleave(self.counts)
        return self.starts[run] + (torch.arange(len(self)) - self.offsets[run]) * self.steps[run]

    def count_below(self, bound: Tensor) -> Tensor:
        """How many positions are smaller than each ``bound``: the global-to-local map of key intervals."""
        if len(self.starts) <= _FEW_RUNS:
            runs = zip(self.starts.tolist(), self.counts.tolist(), self.steps.tolist(), strict=True)
            below = torch.zeros_like(bound)
            for start, count, step in runs:
                below += _ceil_div(bound - start, step).clamp_(0, count)
            return below
        run = torch.searchsorted(self.starts, bound) - 1  # the last run that starts below the bound
        inside = _ceil_div(bound - self.starts[run], self.steps[run])
        below = self.offsets[run] + torch.minimum(inside, self.counts[run])
        return below.masked_fill_(run < 0, 0)

    def within(self, segments: Tensor) -> Positions:
        """Those in one of the ``[S, 2]`` sorted disjoint half-open segments."""
        low, high = (self.count_below(bound) for bound in segments.t().contiguous())
        low, high = low[high > low], high[high > low]
        if not len(low):
            return Positions.runs([])
        # Local intervals low .. high may span runs: split them where runs begin.
        cuts = torch.cat([low, self.offsets[1:]]).unique()
        ends = torch.cat([cuts[1:], cuts.new_tensor([len(self)])])
        piece = torch.searchsorted(low, cuts, right=True) - 1
        begin, end = cuts, torch.minimum(ends, high[piece.clamp(min=0)])
        end = torch.where(piece < 0, begin, end)
        run = torch.searchsorted(self.offsets, begin, right=True) - 1
        starts = self.starts[run] + (begin - self.offsets[run]) * self.steps[run]
        return Positions(starts, (end - begin).clamp_(min=0), self.steps[run])


def _ceil_div(value: Tensor, step: int | Tensor) -> Tensor:
    if isinstance(step, int) and step == 1:
        return value
    return -torch.div(-value, step, rounding_mode="floor")


def union(start: Tensor, end: Tensor) -> Tensor:
    """The union of half-open intervals ``start .. end [rows, T]``, non-decreasing in each row, as sorted ``[S, 2]``."""
    segments = torch.cat([_row_union(*row) for row in zip(start, end, strict=True)])
    if len(start) > 1:
        low, order = segments[:, 0].sort()
        segments = _row_union(low, segments[order, 1].cummax(0).values)
    return segments


def _row_union(start: Tensor, end: Tensor) -> Tensor:
    if bool((end <= start).any()):
        start, end = start[end > start], end[end > start]
    gap = start[1:] > end[:-1]
    if not len(start) or not bool(gap.any()):
        return torch.stack([start[:1], end[-1:]], 1)
    after = gap.nonzero().squeeze(1) + 1
    return torch.stack([torch.cat([start[:1], start[after]]), torch.cat([end[after - 1], end[-1:]])], 1)
