"""Cut key intervals into dense pieces, so that a kernel which knows only "full" and "causal" can compute them.

The bounds of every mask are piecewise linear in the query with slope 0 or 1, so a few pieces cover a block: a run of
queries with constant bounds is a rectangle, one whose ``end`` grows by one per query is a rectangle and a triangle, and
one whose ``start`` grows too (a window) is a band, computed in tiles under a mask. Runs too short to be worth a call of
their own are joined into masked tiles.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

TILE_ROWS = 192
CALL_PAIRS = 1024  # a kernel call costs about as much as this many query-key pairs
KEY_PAIRS = 40  # and as this many for each of its keys, whose dK and dV it clears and adds to others
JOINTLY = 1.1  # so much more may be computed in calls for all heads than in those of each
MASKED_PAIRS = 1 << 20  # the largest mask worth building: beyond it, only ragged edges are masked


class Piece(NamedTuple):
    """Queries ``rows`` against keys ``keys``: all of them, a lower triangle (a square), or those in the intervals."""

    rows: slice
    keys: slice
    kind: Literal["full", "causal", "masked"]
    first: bool  # no earlier piece of the block holds these rows


def cut_into_pieces(start: Tensor, end: Tensor) -> list[Piece]:
    """Pieces that hold exactly the pairs ``start[i] <= j < end[i]``; start, end int ``[Tq]`` on the CPU."""
    if not len(start):
        return []
    lo, hi = start.numpy().astype(np.int64), end.numpy().astype(np.int64)
    pieces: list[Piece] = []
    for rows, joined in _join_short_runs(lo, hi, _linear_runs(np.stack([lo, hi]))):
        pieces += _cut_run(lo, hi, rows, joined)
    return pieces


def cut_jointly(start: Tensor, end: Tensor, apart: list[list[Piece]]) -> list[Piece] | None:
    """Pieces that hold the pairs of heads whose intervals differ little; None where each is better cut by itself.

    ``start, end [heads, Tq]``; ``apart``: each head's own pieces. Together: rectangles that all heads see, and edges
    under a mask for each of them. Few calls for all heads keep all threads busy; PyTorch's backward gives each head to
    one.
    """
    lo, hi = start.numpy().astype(np.int64), end.numpy().astype(np.int64)
    bounds = np.stack([lo.min(0), lo.max(0), hi.min(0), hi.max(0)])
    pieces: list[Piece] = []
    cost = 0
    for rows in _join_steps(_linear_runs(bounds)):
        first, inner_first, inner_last, last = (int(x) for x in _envelope(bounds[:, rows]))
        inner = Piece(rows, slice(inner_first, inner_last), "full", True)
        edges = (
            [slice(first, inner_first), slice(inner_last, last)] if inner_first < inner_last else [slice(first, last)]
        )
        found = [inner] if inner_first < inner_last else []
        for edge in edges:
            if edge.start < edge.stop:
                if (rows.stop - rows.start) * (edge.stop - edge.start) * len(lo) > MASKED_PAIRS:
                    return None
                found.append(Piece(rows, edge, "masked", not found))
        cost += sum((_cost([piece]) - CALL_PAIRS) * len(lo) + CALL_PAIRS for piece in found)
        pieces += found
    return pieces if cost <= JOINTLY * sum(map(_cost, apart)) else None


def plain_piece(start: Tensor, end: Tensor) -> Piece | None:
    """The rectangle or triangle that holds exactly the pairs ``start[i] <= j < end[i]``, or None."""
    lo, hi = start.numpy().astype(np.int64), end.numpy().astype(np.int64)
    runs = _linear_runs(np.stack([lo, hi])) if len(lo) else []
    if len(runs) != 1 or lo[runs[0].start] != lo[runs[0].stop - 1]:
        return None
    pieces = _cut_run(lo, hi, runs[0], joined=False)
    return pieces[0] if len(pieces) == 1 else None


def _linear_runs(bounds: np.ndarray) -> list[slice]:
    """Runs of queries along which all bounds ``[n, Tq]`` grow by 0 or by 1 per query, steadily.

    The first is the least and the last the greatest; runs without keys are left out.
    """
    lo, hi, steps = bounds[0], bounds[-1], np.diff(bounds, axis=1)
    jump = np.any((steps < 0) | (steps > 1), axis=0)
    bend = np.zeros_like(jump)
    bend[1:] = np.any(steps[:, 1:] != steps[:, :-1], axis=0) & ~jump[1:] & ~jump[:-1]
    # A bend at step i says that rows i and i+1 grow differently from rows i-1 and i: row i closes the earlier run.
    first = np.flatnonzero(np.concatenate([[True], jump | bend]))
    bounds = np.append(first, len(lo))
    holds_pairs = np.maximum((hi - lo)[bounds[:-1]], (hi - lo)[bounds[1:] - 1]) > 0  # linear: largest at an end
    return [slice(a, b) for a, b in zip(bounds[:-1][holds_pairs], bounds[1:][holds_pairs], strict=True)]


def _join_steps(runs: list[slice]) -> list[slice]:
    """Runs that are shorter than a tile joined to the one before, if they follow it."""
    joined: list[slice] = []
    for run in runs:
        if joined and run.stop - run.start < TILE_ROWS and joined[-1].stop == run.start:
            joined[-1] = slice(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined


def _envelope(bounds: np.ndarray) -> tuple[int, int, int, int]:
    """Of rows of a tile: the first key that any sees, the first that all see, the last that all see, and that any."""
    least, latest, soonest, greatest = bounds
    return least[0], latest[-1], soonest[0], greatest[-1]


def _join_short_runs(lo: np.ndarray, hi: np.ndarray, runs: list[slice]) -> list[tuple[slice, bool]]:
    """Join neighbouring runs while a tile over them costs no more than each by itself."""
    joined: list[tuple[slice, bool]] = []
    apart = 0
    for run in runs:
        alone = _cost(_cut_run(lo, hi, run, joined=False))
        if joined and run.stop - joined[-1][0].start <= TILE_ROWS:
            tile = slice(joined[-1][0].start, run.stop)
            if _cost(_cut_tile(lo, hi, tile)) <= apart + alone:
                joined[-1] = (tile, True)
                apart += alone
                continue
        joined.append((run, False))
        apart = alone
    return joined


def _cost(pieces: list[Piece]) -> int:
    """In query-key pairs, as both passes take them: what is computed, a call each, and passes over its keys."""
    cost = 0
    for piece in pieces:
        rows, keys = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
        computed = rows * (rows + TILE_ROWS) // 2 if piece.kind == "causal" and rows > TILE_ROWS else rows * keys
        cost += CALL_PAIRS + KEY_PAIRS * keys + computed
    return cost


def _cut_run(lo: np.ndarray, hi: np.ndarray, rows: slice, joined: bool) -> list[Piece]:
    last = rows.stop - 1
    if not joined and lo[rows.start] == lo[last]:
        start, end = int(lo[last]), int(hi[rows.start])
        if end == hi[last]:
            return [Piece(rows, slice(start, end), "full", True)]
        # Row i of the run sees start .. end + i - 1: a triangle from key end - 1, and a rectangle before it. Rows
        # that see nothing yet would put the triangle's corner before the first key: they are dropped.
        empty = max(0, start - end + 1)
        rows, end = slice(rows.start + empty, rows.stop), end + empty
        triangle = slice(end - 1, end - 1 + rows.stop - rows.start)
        before = slice(start, end - 1)
        if before.start == before.stop:
            return [Piece(rows, triangle, "causal", True)]
        return [Piece(rows, before, "full", True), Piece(rows, triangle, "causal", False)]
    pieces = []
    for tile in range(rows.start, rows.stop, TILE_ROWS):
        pieces += _cut_tile(lo, hi, slice(tile, min(tile + TILE_ROWS, rows.stop)))
    return pieces


def _cut_tile(lo: np.ndarray, hi: np.ndarray, rows: slice) -> list[Piece]:
    """One masked piece, or a full one between two masked edges where the mask of the whole would be large."""
    seen = np.flatnonzero(hi[rows] > lo[rows]) + rows.start
    if not len(seen):
        return []
    start, inner_start = int(lo[seen[0]]), int(lo[seen[-1]])
    inner_end, end = int(hi[seen[0]]), int(hi[seen[-1]])
    if (rows.stop - rows.start) * (end - start) <= MASKED_PAIRS or inner_start >= inner_end:
        return [Piece(rows, slice(start, end), "masked", True)]
    edges = [slice(start, inner_start), slice(inner_end, end)]
    rows = slice(int(seen[0]), int(seen[-1]) + 1)
    masked = [Piece(rows, edge, "masked", False) for edge in edges if edge.start < edge.stop]
    return [Piece(rows, slice(inner_start, inner_end), "full", True), *masked]
