"""Blocks, and the kernel calls they are made of: which heads' queries against which of the rows that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.kernels import Intervals

from .parts import HeadGroup, Part
from .positions import Positions
from .reach import Totals, inside
from .selections import Consecutive, Picked, Selection, Whole


@dataclass(frozen=True, eq=False)
class Section:
    """One kernel call of a block: some heads' queries against some of the rows.

    Attributes:
        group: of which group of heads, by :attr:`Itinerary.groups`.
        keys: which rows.
        intervals: which of them each query sees; for all heads alike, or for each KV head of the group.
        pairs: query-key pairs, summed over the mask's batch rows, and over KV heads where they see different keys.
        final: whether no later section has pairs of this group.
    """

    group: int
    keys: Selection
    intervals: Intervals
    pairs: int
    final: bool = False


@dataclass(frozen=True, eq=False)
class Block:
    """This rank's queries against the rows of one rank's keys that arrive here, or of all other ranks' (None).

    Attributes:
        source: whose keys.
        rows: how many rows arrive.
        keys: which tokens they are, where they are rows of all heads; None where of one head each.
        sections: what is computed with them.
    """

    source: int | None
    rows: int
    keys: Positions | None
    sections: tuple[Section, ...]

    @property
    def pairs(self) -> int:
        """Of all sections."""
        return sum(section.pairs for section in self.sections)

    @property
    def intervals(self) -> Intervals:
        """Of its one section, where the mask is one interval per query for all heads."""
        (section,) = self.sections
        return section.intervals


class Bound:
    """Bounds int64 ``[rows, T]``, and each row's distinct values, which are few where bounds are steps."""

    def __init__(self, bounds: Tensor) -> None:
        self.bounds = bounds
        self._steps: list[tuple[Tensor, Tensor]] = []

    @property
    def steps(self) -> list[tuple[Tensor, Tensor]]:
        """For each row its distinct values, and which of them each bound is."""
        if not self._steps:
            self._steps = [row.unique_consecutive(return_inverse=True) for row in self.bounds]
        return self._steps


class Seen(NamedTuple):
    """What a rank's queries see in one part; and by which key boundaries stripes are counted, of all rows or each."""

    part: Part
    low: Bound
    high: Bound
    document_keys: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, part: Part, queries: Tensor, length: int, kv_length: int) -> Seen:
        """By the global positions ``queries [T]``."""
        low, high = part.mask.intervals(queries, length, kv_length)
        keys = part.mask.documents_within(length, kv_length).keys
        if part.stripes is None or len(set(keys)) == 1:
            keys = keys[:1]
        return cls(part, Bound(low), Bound(high), keys)


class Found(NamedTuple):
    """Keys of one head: global positions, and where they stand among the rows that are there."""

    positions: Tensor
    place: Tensor


def block_of_tokens(
    source: int | None,
    keys: Positions,
    groups: Sequence[HeadGroup],
    seen: Sequence[Sequence[Seen]],
    kv_heads: int | None,
) -> Block:
    """Of rows of all heads."""
    sections = []
    for number, (group, parts) in enumerate(zip(groups, seen, strict=True)):
        for part in parts:
            stripes = part.part.stripes
            if stripes is None:
                start, end = (keys.count_below(x.bounds).to(torch.int32).unsqueeze(1) for x in (part.low, part.high))
                intervals = Intervals(start, end)
                heads = 1 if group.heads is None else len(group.heads)
                pairs = int(end.sum() - start.sum()) * heads
                sections.append(Section(number, Whole(group.heads, kv_heads), intervals, pairs))
                continue
            assert group.heads is not None, "stripes are of heads"
            assert kv_heads is not None, "stripes are of heads"
            found = []
            for document_keys in part.document_keys:
                held = stripes.hold(keys.tensor, document_keys)
                rows = [mask.nonzero().squeeze(1) for mask in held]
                found.append(
                    [Found(keys.tensor[r], r * kv_heads + head) for r, head in zip(rows, group.heads, strict=True)]
                )
            sections += section_of(number, part, found, of_one_head=kv_heads == 1)
    return Block(source, len(keys), keys, tuple(sections))


def block_of_heads(
    source: int,
    keys: Positions,
    wanted: Sequence[Sequence[Tensor]],
    groups: Sequence[HeadGroup],
    seen: Sequence[Sequence[Seen]],
) -> Block:
    """Of rows of one head each: those of the source's ``keys`` that are ``wanted``, one head's after another's."""
    needed = _any_part(wanted, keys)
    place = needed.flatten().cumsum(0).view_as(needed) - 1  # of each needed row among all that arrive
    sections = []
    for number, (group, parts) in enumerate(zip(groups, seen, strict=True)):
        assert group.heads is not None, "rows are of heads"
        places = place[group.heads.start : group.heads.stop]
        for part, rows in zip(parts, wanted[number], strict=True):
            if not bool(rows.any()):
                continue
            stripes, found = part.part.stripes, []
            for document_keys in part.document_keys:
                if stripes is not None and len(part.document_keys) > 1:
                    rows_here = rows & stripes.hold(keys.tensor, document_keys)
                else:
                    rows_here = rows
                found.append([Found(keys.tensor[r], p[r]) for r, p in zip(rows_here, places, strict=True)])
            sections += section_of(number, part, found, of_one_head=True)
    return Block(source, int(needed.sum()), None, tuple(sections))


def wanted_rows(groups: Sequence[HeadGroup], reached: Totals, reader: int, keys: Positions) -> list[list[Tensor]]:
    """Which of an owner's keys the reader's queries see: by group and part, bool ``[heads of the group, T]``.

    Where batch rows have stripes of their own, every key between.
    """
    wanted = []
    for group, segments, striped in zip(groups, reached.segments, reached.striped, strict=True):
        assert group.heads is not None, "rows are of heads"
        rows = []
        for part, theirs, document_keys in zip(group.parts, segments, striped, strict=True):
            there = inside(theirs[reader], keys.tensor).expand(len(group.heads), -1)
            if part.stripes is not None and document_keys is not None:
                there = there & part.stripes.hold(keys.tensor, document_keys)
            rows.append(there)
        wanted.append(rows)
    return wanted


def single_rows(wanted: Sequence[Sequence[Tensor]], keys: Positions) -> Tensor:
    """The rows of one head each that are wanted, one head's after another's; counted token by token."""
    needed = _any_part(wanted, keys)
    head, token = needed.nonzero().unbind(1)
    return token * len(needed) + head


def _any_part(wanted: Sequence[Sequence[Tensor]], keys: Positions) -> Tensor:
    """Wanted by some part: bool ``[KV heads, T]``; a rank may have been dealt no heads."""
    none = torch.zeros(0, len(keys), dtype=torch.bool)
    return torch.cat([none, *(torch.stack(list(parts)).any(0) for parts in wanted)])


def marked_final(blocks: Sequence[Block], groups: int) -> tuple[Block, ...]:
    """The blocks, with the last section of each group that has pairs marked."""
    waiting, marked = set(range(groups)), []
    for block in reversed(blocks):
        sections = []
        for section in reversed(block.sections):
            final = bool(section.pairs) and section.group in waiting
            sections.append(replace(section, final=True) if final else section)
            if final:
                waiting.remove(section.group)
        marked.append(replace(block, sections=tuple(reversed(sections))))
    return tuple(reversed(marked))


def section_of(group: int, seen: Seen, found: Sequence[Sequence[Found]], *, of_one_head: bool) -> list[Section]:
    """The section of ``found[row][head]`` keys, if any query sees one; rows where batch rows find different keys.

    ``of_one_head``: whether the rows that are there are of one head each.
    """
    most = max(len(keys.positions) for row in found for keys in row)
    if not most:
        return []
    start, end = (_counted(found, bound) for bound in (seen.low, seen.high))
    pairs = int(end.sum() - start.sum())
    if not pairs:
        return []
    index = torch.zeros(len(found), len(found[0]), most, dtype=torch.int64)
    for row, keys_of_heads in enumerate(found):
        for head, keys in enumerate(keys_of_heads):
            index[row, head, : len(keys.place)] = keys.place
    flat = index.flatten()
    together = of_one_head and len(found) == 1 and bool((flat.diff() == 1).all())
    selection = Consecutive(int(flat[0]), len(found[0]), most) if together else Picked(index)
    return [Section(group, selection, Intervals(start, end), pairs)]


def _counted(found: Sequence[Sequence[Found]], bound: Bound) -> Tensor:
    """How many of each head's keys stand before each bound: int32 ``[rows, heads, T]``."""
    counted = []
    for row in range(max(len(found), len(bound.steps))):
        values, place = bound.steps[row % len(bound.steps)]
        below = torch.stack(
            [torch.searchsorted(keys.positions, values, out_int32=True) for keys in found[row % len(found)]]
        )
        counted.append(below.index_select(1, place) if len(values) > 1 else below.expand(-1, len(place)))
    return torch.stack(counted)
