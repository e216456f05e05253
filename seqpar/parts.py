"""What a mask is made of: parts, each one interval per query over all keys or over stripes of them, by head.

Heads that differ only in which stripes they see form a group, and share their parts' intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .positions import Positions

if TYPE_CHECKING:
    from .masks import Mask

CuSeqlens = tuple[int, ...]


@dataclass(frozen=True)
class Stripes:
    """Of each document's keys, for each KV head of a group, every ``stride``-th block: ``n // block % stride`` is its
    residue.

    Packed next to each other they are an ordered set of keys, of which a query sees an interval as of any other.
    """

    block: int
    stride: int
    residues: tuple[int, ...]

    def of_heads(self, heads: slice) -> Stripes:
        """Those of some of the heads."""
        return Stripes(self.block, self.stride, self.residues[heads])

    def hold(self, positions: Tensor, document_keys: CuSeqlens) -> Tensor:
        """Which global positions ``[T]`` are in each head's stripes: bool ``[heads, T]``."""
        bounds = torch.tensor(document_keys)
        first = bounds[torch.searchsorted(bounds, positions, right=True) - 1]
        residue = (positions - first).div(self.block, rounding_mode="floor").remainder(self.stride)
        return residue == torch.tensor(self.residues).unsqueeze(1)

    def count_below(self, held: Positions, bound: Tensor, document_keys: CuSeqlens) -> Tensor:
        """How many of the ``held`` keys in each head's stripes stand before each global ``bound``: ``[heads, *]``."""
        starts, ends, before = _below_runs(self, held, document_keys)
        if not len(starts):
            return bound.new_zeros(len(self.residues), *bound.shape)
        run = (torch.searchsorted(starts, bound) - 1).clamp_(min=0)  # the last that starts below the bound
        inside = torch.minimum(torch.maximum(bound, starts[run]), ends[run])
        return before[:, run] + self._below(inside, document_keys)

    def _below(self, bound: Tensor, document_keys: CuSeqlens) -> Tensor:
        """The same of all keys."""
        if len(document_keys) == 2:
            return self.count_in_one(bound)
        bounds = torch.tensor(document_keys)
        earlier = self.count_in_one(bounds.diff()).cumsum(1)
        earlier = torch.cat([earlier.new_zeros(len(self.residues), 1), earlier], 1)
        document = (torch.searchsorted(bounds, bound, right=True) - 1).clamp_(0, len(bounds) - 2)
        return earlier[:, document] + self.count_in_one(bound - bounds[document])

    def count_in_one(self, bound: Tensor) -> Tensor:
        """How many keys of each head's stripes stand before each ``bound`` in one document: ``[heads, *]``."""
        residues, period = torch.tensor(self.residues).view(-1, *[1] * bound.dim()), self.block * self.stride
        turns = bound.div(period, rounding_mode="floor")
        return turns * self.block + (bound - turns * period - residues * self.block).clamp_(0, self.block)


@lru_cache(maxsize=256)
def _below_runs(stripes: Stripes, held: Positions, document_keys: CuSeqlens) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of neighbours as starts and ends ``[R]``; and ``[heads, R]`` to which a run adds what is below a bound."""
    if bool((held.steps != 1).any()):
        held = Positions.of(held.tensor)
    starts, ends = held.starts, held.starts + held.counts
    low, high = stripes._below(starts, document_keys), stripes._below(ends, document_keys)
    earlier = (high - low).cumsum(1) - (high - low)
    return starts, ends, earlier - low


class Part(NamedTuple):
    """One interval of keys per query: what ``mask`` says, of all keys or of each head's stripes."""

    mask: Mask
    stripes: Stripes | None = None


class HeadGroup(NamedTuple):
    """Neighbouring KV heads (None: all there are), and the disjoint parts that together are what they see."""

    heads: range | None
    parts: tuple[Part, ...]

    def among(self, heads: range | None) -> HeadGroup:
        """The group without the heads that are not among ``heads``."""
        if heads is None:
            return self
        if self.heads is None:
            return HeadGroup(heads, self.parts)
        kept = range(max(self.heads.start, heads.start), min(self.heads.stop, heads.stop))
        inside = slice(kept.start - self.heads.start, max(kept.start, kept.stop) - self.heads.start)
        return HeadGroup(kept, tuple(Part(mask, stripes and stripes.of_heads(inside)) for mask, stripes in self.parts))


def intersections(ours: Sequence[HeadGroup], theirs: Sequence[HeadGroup]) -> Iterator[tuple[HeadGroup, HeadGroup]]:
    """Pairs of groups, each cut to the heads that both have."""
    for a in ours:
        for b in theirs:
            mine = a.among(b.heads)
            if mine.heads is None or mine.heads:
                yield mine, b.among(mine.heads)


def dealt(groups: Sequence[HeadGroup], heads: range | None) -> tuple[HeadGroup, ...]:
    """Of the groups, what the KV heads ``heads`` see, counted from the first of these; all of them where None."""
    if heads is None or groups[0].heads is None:
        return tuple(groups)
    found = [group.among(heads) for group in groups]
    first = heads.start
    return tuple(HeadGroup(range(h.start - first, h.stop - first), parts) for h, parts in found if h)
