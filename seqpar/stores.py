"""Where a rank of a cache keeps the keys that one part of a mask sees, and which kernel calls read them.

A rank's keys of a head are stripes of the text: of every few pages one. The n-th of them lies in row ``n % rows`` of
the head's room, so that a window's oldest keys make place for new ones; a part that forgets nothing has room for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from seqpar.kernels import Intervals

from .parts import HeadGroup, Part, Stripes
from .sections import Section
from .selections import Consecutive

NEVER = 1 << 40  # a position that no text reaches
Among = Literal["all", "old", "new"]
"""Of the keys: all, those before a step's new tokens, or those of the new tokens."""


class Appended(NamedTuple):
    """A batch row in one step: its text is ``length`` tokens long now, of which the last ``new`` are new."""

    length: int
    new: int


@dataclass(frozen=True)
class Store:
    """Room for the keys of one part of a mask: ``rows`` rows of each of neighbouring heads, one head after another.

    Attributes:
        group: of which group of heads.
        part: what is seen of it.
        heads: the KV heads.
        mine: which keys are this rank's, by head: of every ``mine.stride`` pages one.
        last: from this position on nothing is seen in this part.
        rows: to a head.
        first: the first row, among all rows of the cache.
    """

    group: int
    part: Part
    heads: range
    mine: Stripes
    last: int
    rows: int
    first: int

    @classmethod
    def of(
        cls, number: int, group: HeadGroup, part: Part, page: int, place: tuple[int, int], sizes: tuple[int, int],
        first: int,
    ) -> Store:  # fmt: skip
        """``place``: which rank of how many. ``sizes``: the longest text, and the most tokens appended at once.

        Page ``j`` is rank ``j mod ranks``'s; the m-th stripe of head h is rank ``(m + h) mod ranks``'s, so that each
        head's stripes are spread over all ranks also where the stride is a multiple of them.
        """
        (rank, ranks), (capacity, chunk), heads = place, sizes, group.heads
        assert heads is not None, "groups are of heads here"
        stride, residues = ranks, (rank,) * len(heads)
        if part.stripes is not None:
            stride = part.stripes.stride * ranks
            both = zip(heads, part.stripes.residues, strict=True)
            residues = tuple(own + part.stripes.stride * ((rank - head) % ranks) for head, own in both)
        mine = Stripes(page, stride, residues)
        last = int(limits(part, torch.tensor(NEVER - 1))[1])
        begin = torch.arange(0, capacity, page)
        end = (begin + page + chunk).clamp(max=min(capacity, last))
        low = torch.minimum(limits(part, begin)[0].clamp(min=0), end)
        rows = int((mine.count_in_one(end) - mine.count_in_one(low)).max())
        return cls(number, part, heads, mine, last, rows, first)

    def pages(self, length: int) -> Tensor:
        """Which pages of a text of this length are here and seen by the next query: bool ``[heads, pages]``.

        What later ones see besides, another part holds until then.
        """
        page = self.mine.block
        begin = torch.arange(0, length, page)
        low, high = limits(self.part, torch.tensor(length))  # of the next query
        end = high.clamp(max=self.last)
        seen = (begin + page > low) & (begin < end) & (low < end)
        return seen & self.mine.hold(begin, (0, NEVER))

    def writes(self, appended: Appended) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch row's new tokens those that are kept here: which of them, of which KV head, and to which row."""
        positions = torch.arange(appended.length - appended.new, appended.length)
        kept = self.mine.hold(positions, (0, NEVER)) & (positions < self.last)
        head, token = kept.nonzero().unbind(1)
        row = self.mine.count_in_one(positions)[head, token] % self.rows
        return token, head + self.heads.start, self.first + head * self.rows + row

    def sections(self, appended: Sequence[Appended], tokens: int, among: Among = "all") -> list[Section]:
        """The kernel calls of the new tokens' queries, the last of ``tokens`` in each batch row, over some of the keys.

        Two where what they see begins in rows before the end of the room and goes on at its start.
        """
        alike = appended[:1] if len(set(appended)) == 1 else appended
        heads = 1 if self.part.stripes is None else len(self.heads)  # else they see the same of the same
        start, end = (torch.zeros(len(alike), heads, tokens, dtype=torch.int64) for _ in range(2))
        for row, (length, count) in enumerate(alike):
            if count:
                queries = torch.arange(length - count, length)
                bounds = (x[0] for x in self.part.mask.intervals(queries, length, length))
                counted = (self.mine.count_in_one(x)[:heads] for x in bounds)
                if among != "all":
                    turning = self.mine.count_in_one(torch.tensor(length - count))[:heads].unsqueeze(1)
                    clip = torch.minimum if among == "old" else torch.maximum
                    counted = (clip(x, turning) for x in counted)
                start[row, :, -count:], end[row, :, -count:] = counted
        base = start.masked_fill(end <= start, NEVER).amin(2, keepdim=True)
        base = base.masked_fill_(base == NEVER, 0)
        turn = (base.div(self.rows, rounding_mode="floor") + 1) * self.rows  # from here on rows are counted anew
        found = []
        for begin in (turn - self.rows, turn):
            first, last = ((x.clamp(begin, begin + self.rows) - begin) for x in (start, end))
            pairs = int((last - first).sum())
            if pairs:
                low, high = int(first[last > first].min()), int(last.max())
                low_by, high_by = ((x - low).clamp_(0, high - low).to(torch.int32) for x in (first, last))
                rows = Consecutive(self.first, len(self.heads), self.rows, (low, high))
                found.append(Section(self.group, rows, Intervals(low_by, high_by), pairs))
        return found


def limits(part: Part, query: Tensor) -> tuple[Tensor, Tensor]:
    """Before which key, and from which on, neither a query nor a later one (an earlier one) sees anything in a part.

    Of each term by itself: of an interval that is empty, :meth:`Mask.intervals` says nothing of either end.
    """
    many = torch.tensor(NEVER)
    low, high = torch.zeros_like(query), torch.full_like(query, NEVER)
    for term in part.mask.terms:
        begin, end = term.rule(query, many, many)
        low = torch.maximum(low, torch.as_tensor(begin))
        high = torch.minimum(high, end)
    return low, high
