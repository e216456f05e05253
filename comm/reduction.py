"""Reductions: every rank has its part of the same thing, and all parts become one, on every rank or each on its owner.

A part is a few tensors ``[B, T, H, n]`` (a partial result and its weights, or a gradient), and ``join`` makes one of
the parts of all ranks, in the order of ranks. So every rank comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .messages import Form, gather, swap
from .meter import Traffic
from .world import World

Join = Callable[[list[list[Tensor]]], list[Tensor]]
Way = Literal["gather", "scatter"]

SECOND_CALL = 1 << 18
"""Bytes that a second call must save a rank: what it sends in the time that a call takes besides."""


class Wire(NamedTuple):
    """How parts travel: the dtype of each tensor; how many of the joined ones go to every rank, and their dtypes.

    ``kind`` and ``home_kind`` count them in the meter. ``way``: ``gather`` sends every part whole to every rank, in one
    call; ``scatter`` deals the heads to ranks, which join theirs and gather the result; None is what costs less.
    """

    dtypes: tuple[torch.dtype, ...]
    home: tuple[torch.dtype, ...]
    kind: str
    home_kind: str
    way: Way | None = None

    def way_of(self, ranks: int, part: int, result: int) -> Way:
        """How ``ranks`` ranks reduce parts of so many bytes to results of so many."""
        if self.way is not None:
            return self.way
        saved = (ranks - 1) * part - (ranks - 1) * (part + result) // ranks
        return "scatter" if saved > SECOND_CALL else "gather"


def reduce_everywhere(levels: Sequence[World], part: Sequence[Tensor], join: Join, wire: Wire) -> list[Tensor]:
    """The joined parts of all ranks, on every one of them: first among the ranks of a node, then between nodes.

    ``levels``: those that this rank meets inside its node, then those at its place in every node. Of the joined tensors
    those that ``wire.home`` names, in these dtypes or wider.
    """
    kept = len(wire.home)
    if not levels or not part[0].numel():
        return list(part[:kept])
    world, *outer = levels
    heads = part[0].shape[2]
    sizes = _bytes(part, wire.dtypes), _bytes(part[:kept], wire.home)
    if wire.way_of(world.size, *sizes) == "gather":
        rounded = [x.to(dtype) for x, dtype in zip(part, wire.dtypes, strict=True)]
        joined = join(gather(world, rounded, wire.kind))
        return reduce_everywhere(outer, joined, join, wire)
    shares = even_shares(heads, world.size)
    mine = reduce_everywhere(outer, reduce_to_owners(world, part, shares, 2, join, wire), join, wire)
    mine = [x.to(dtype) for x, dtype in zip(mine, wire.home, strict=True)]
    return _gather_shares(world, mine, shares, wire.home_kind)


def reduce_to_owners(
    world: World, part: Sequence[Tensor], owned: Sequence[slice | Tensor], dim: int, join: Join, wire: Wire
) -> list[Tensor]:
    """The joined parts of what this rank owns: each rank's slice or indices along ``dim`` (1: tokens, 2: heads)."""
    mine = [_taken(x, dim, owned[world.rank]) for x in part]

    def pack(peer: int, into: list[Tensor]) -> None:
        for x, room in zip(part, into, strict=True):
            room.copy_(_taken(x, dim, owned[peer]))

    def forms(rank: int) -> list[Form]:
        count = _count(owned[rank])
        shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for x in part]
        return list(zip(shapes, wire.dtypes, strict=True))

    sent = [forms(peer) for peer in range(world.size)]
    parts = swap(world, pack, sent, [forms(world.rank)] * world.size, part[0].device, wire.kind)
    parts[world.rank] = mine
    return join(parts)


def traffic(levels: Sequence[tuple[int, int]], elements: Sequence[int], heads: int, wire: Wire) -> list[Traffic]:
    """What one rank sends in each level of :func:`reduce_everywhere`: its parts, and what goes home.

    ``levels``: how many ranks there are in each, and which of them this one is. ``elements``: of each tensor, to a
    head.
    """
    if not levels or not heads:
        return [Traffic(0, 0)] * len(levels)
    (ranks, rank), *outer = levels
    each = sum(n * dtype.itemsize for n, dtype in zip(elements, wire.dtypes, strict=True))
    result = sum(n * dtype.itemsize for n, dtype in zip(elements, wire.home, strict=False))
    if wire.way_of(ranks, each * heads, result * heads) == "gather":
        return [Traffic(1, (ranks - 1) * each * heads), *traffic(outer, elements, heads, wire)]
    counts = [_count(share) for share in even_shares(heads, ranks)]
    others, mine = [count for peer, count in enumerate(counts) if peer != rank and count], result * counts[rank]
    sent = Traffic(len(others) + (ranks - 1 if mine else 0), each * sum(others) + (ranks - 1) * mine)
    return [sent, *traffic(outer, elements, counts[rank], wire)]


def even_shares(heads: int, ranks: int) -> list[slice]:
    """As many heads to each rank, in order; some get none where there are fewer than ranks."""
    return [slice(first, last) for first, last in pairwise(rank * heads // ranks for rank in range(ranks + 1))]


def summed(parts: list[list[Tensor]]) -> list[Tensor]:
    """The sum of each tensor, in fp32 at least and in the order of ranks."""
    totals = [x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in parts[0]]
    for part in parts[1:]:
        for total, x in zip(totals, part, strict=True):
            total += x
    return totals


def _gather_shares(world: World, mine: list[Tensor], shares: Sequence[slice], kind: str) -> list[Tensor]:
    """Every rank's heads of each tensor, together; one message to each peer."""
    counts = [_count(share) for share in shares]
    forms = [[((*x.shape[:2], count, x.shape[3]), x.dtype) for x in mine] for count in counts]

    def pack(peer: int, into: list[Tensor]) -> None:
        for room, x in zip(into, mine, strict=True):
            room.copy_(x)

    parts = swap(world, pack, [forms[world.rank]] * world.size, forms, mine[0].device, kind)
    parts[world.rank] = mine
    return [torch.cat(tensors, 2) for tensors in zip(*parts, strict=True)]


def _taken(x: Tensor, dim: int, owned: slice | Tensor) -> Tensor:
    if isinstance(owned, Tensor):
        return x.index_select(dim, owned)
    return x.narrow(dim, owned.start, owned.stop - owned.start)


def _count(owned: slice | Tensor) -> int:
    return len(owned) if isinstance(owned, Tensor) else owned.stop - owned.start


def _bytes(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> int:
    return sum(x.numel() * dtype.itemsize for x, dtype in zip(tensors, dtypes, strict=True))
