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
from .reach import Totals, inside, striped_keys
from .selections import Picked, Selection, Span, Whole


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


class Seen(NamedTuple):
    """What a rank's queries see in one part: bounds int64 ``[rows, T]``, and the key boundaries of documents, one for all rows or each."""

    part: Part
    low: Tensor
    high: Tensor
    document_keys: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, part: Part, queries: Tensor, length: int, kv_length: int) -> Seen:
        """By the global positions ``queries [T]``."""
        low, high = part.mask.intervals(queries, length, kv_length)
        shared = striped_keys(part, length, kv_length)
        keys = part.mask.documents_within(length, kv_length).keys if shared is None else (shared,)
        return cls(part, low, high, keys)


class Found(NamedTuple):
    """Keys of one head: global positions, and where they stand among the rows that are there."""

    positions: Tensor
    index: Tensor


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
                start, end = keys.count_below(part.low), keys.count_below(part.high)
                intervals = Intervals(*(bound.to(torch.int32).unsqueeze(1) for bound in (start, end)))
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
            sections += _section(number, part, found)
    return Block(source, len(keys), keys, tuple(sections))


def block_of_heads(
    source: int, positions: Sequence[Tensor], groups: Sequence[HeadGroup], seen: Sequence[Sequence[Seen]]
) -> Block:
    """Of rows of one head each: ``positions`` of every KV head, one head's after another's."""
    counts = [len(p) for p in positions]
    ends = torch.tensor(counts).cumsum(0).tolist()
    arrived = [Found(p, torch.arange(end - len(p), end)) for p, end in zip(positions, ends, strict=True)]
    sections = []
    for number, (group, parts) in enumerate(zip(groups, seen, strict=True)):
        assert group.heads is not None, "rows are of heads"
        of_group = arrived[group.heads.start : group.heads.stop]
        for part in parts:
            found = [of_group]
            if part.part.stripes is not None:
                stripes, found = part.part.stripes, []
                for document_keys in part.document_keys:
                    each = []
                    for head, (p, index) in enumerate(of_group):
                        held = stripes.of_heads(slice(head, head + 1)).hold(p, document_keys)[0]
                        each.append(Found(p[held], index[held]))
                    found.append(each)
            sections += _section(number, part, found)
    return Block(source, sum(counts), None, tuple(sections))


def needed_by_heads(
    groups: Sequence[HeadGroup], reached: Totals, reader: int, keys: Positions, kv_heads: int
) -> list[Tensor]:
    """Which of an owner's keys each KV head of the reader needs: sorted local indices."""
    needed = torch.zeros(kv_heads, len(keys), dtype=torch.bool)
    for group, segments, striped in zip(groups, reached.segments, reached.striped, strict=True):
        assert group.heads is not None, "rows are of heads"
        rows = needed[group.heads.start : group.heads.stop]
        for part, theirs, document_keys in zip(group.parts, segments, striped, strict=True):
            there = inside(theirs[reader], keys.tensor)
            if part.stripes is not None and document_keys is not None:
                there = there & part.stripes.hold(keys.tensor, document_keys)
            rows |= there
    return [row.nonzero().squeeze(1) for row in needed]


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


def _section(group: int, seen: Seen, found: Sequence[Sequence[Found]]) -> list[Section]:
    """The section of ``found[row][head]`` keys, if any query sees one; rows where batch rows find different keys."""
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
            index[row, head, : len(keys.index)] = keys.index
    flat = index.flatten()
    together = len(found) == 1 and bool((flat.diff() == 1).all())
    selection = Span(int(flat[0]), len(found[0]), most) if together else Picked(index)
    return [Section(group, selection, Intervals(start, end), pairs)]


def _counted(found: Sequence[Sequence[Found]], bound: Tensor) -> Tensor:
    """How many of each head's keys stand before each bound ``[rows, T]``: int32 ``[rows, heads, T]``."""
    counted = []
    for row in range(max(len(found), len(bound))):
        values, place = bound[row % len(bound)].unique_consecutive(return_inverse=True)  # few, where bounds are steps
        below = [torch.searchsorted(keys.positions, values) for keys in found[row % len(found)]]
        counted.append(torch.stack(below).to(torch.int32)[:, place])
    return torch.stack(counted)
