"""Balanced layouts: chunks of the sequence dealt so that every rank has as many tokens, and as much work, as others."""

from __future__ import annotations

import numpy as np

from .parts import HeadGroup
from .positions import Positions
from .reach import busiest_rows, totals

CHUNKS_PER_RANK = 16
FEW_CHUNKS = 1024  # that are quickly dealt; more ranks get fewer chunks each
EVEN = 1.02  # the busiest rank's work over the mean, below which no chunk is swapped


def default_chunk(length: int, world: int) -> int:
    """Tokens of a chunk: about sixteen chunks for each rank, in whole tiles of the kernels where they are long."""
    chunks = min(CHUNKS_PER_RANK * world, max(FEW_CHUNKS, 2 * world))
    chunk = max(1, length // chunks)
    return chunk - chunk % 64 if chunk >= 128 else chunk


def balanced(
    groups: tuple[HeadGroup, ...], length: int, kv_length: int, world: int, chunk: int
) -> tuple[Positions, ...]:
    """Which tokens each rank holds: chunks of ``chunk`` tokens, as many for each rank (one more for some).

    Work is the number of query-key pairs that the mask's ``groups`` of heads see. From chunks dealt in order, and from
    chunks dealt from both ends (zigzag), the busiest rank swaps one of its chunks with another rank's, as long as that
    helps; the dealing whose busiest rank then moves the fewest rows is taken, unless the other is clearly more even.
    """
    chunks = tuple(Positions.runs([(first, min(chunk, length - first), 1)]) for first in range(0, length, chunk))
    work = totals(groups, chunks, (), length, kv_length).pairs.numpy().astype(np.float64)
    dealings = []
    for owner in _first_dealings(len(chunks), world):
        _swap_until_even(owner, work, world)
        held = tuple(_held_by(owner == rank, length, chunk) for rank in range(world))
        load = np.bincount(owner, work, world)
        busiest = busiest_rows(totals(groups, held, held, length, kv_length).needed) if kv_length == length else 0
        dealings.append((round(load.max() / max(load.mean(), 1.0) / 0.02), busiest, held))
    return min(dealings, key=lambda dealing: dealing[:2])[2]


def _first_dealings(chunks: int, world: int) -> list[np.ndarray]:
    """Whose each chunk is at first, in order and from both ends. The last, which may be short, is an extra one."""
    each, extra = divmod(chunks, world)
    # Ranks with one chunk more are the last ones, so that the last chunk is among those.
    counts = np.array([each + (rank >= world - extra) for rank in range(world)])
    in_order = np.repeat(np.arange(world), counts)
    heads = counts // 2
    from_both_ends = np.concatenate(
        [np.repeat(np.arange(world), heads), np.repeat(np.arange(world), counts - heads)[::-1]]
    )
    if extra:  # the last chunk is now rank 0's: give it to a rank that has one more
        swapped = int(np.flatnonzero(from_both_ends == world - 1)[-1])
        from_both_ends[[swapped, -1]] = from_both_ends[[-1, swapped]]
    return [in_order, from_both_ends]


def _swap_until_even(owner: np.ndarray, work: np.ndarray, world: int) -> None:
    """Swap chunks, in place; never the last one, which may be short."""
    load = np.bincount(owner, work, world)
    movable = np.arange(len(work)) < len(work) - 1
    for _ in range(4 * len(work)):
        busy = int(load.argmax())
        if load[busy] <= EVEN * load.mean():
            return
        mine, theirs = np.flatnonzero((owner == busy) & movable), np.flatnonzero((owner != busy) & movable)
        if not len(mine) or not len(theirs):
            return
        moved = work[mine][:, None] - work[theirs][None, :]
        busiest = np.maximum(load[busy] - moved, load[owner[theirs]][None, :] + moved)
        give, take = np.unravel_index(int(busiest.argmin()), busiest.shape)
        if busiest[give, take] >= load[busy]:
            return
        give, take, other = mine[give], theirs[take], owner[theirs[take]]
        load[busy] -= work[give] - work[take]
        load[other] += work[give] - work[take]
        owner[give], owner[take] = other, busy


def _held_by(mine: np.ndarray, length: int, chunk: int) -> Positions:
    """The tokens of the chunks that are marked, neighbours joined."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mine.astype(np.int8), [0]])))
    runs = [
        (int(a) * chunk, min(int(b) * chunk, length) - int(a) * chunk, 1)
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]
    return Positions.runs(runs)
