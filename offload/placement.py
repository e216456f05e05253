"""Who holds what: how a sequence's keys and values are cut into parts, and which worker takes each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from seqpar.comm.reduction import even_shares
from seqpar.masks import check_int

from .errors import NoRoom

LOCAL = -1
"""The holder that is the model rank itself."""


@dataclass(frozen=True)
class Placement:
    """How each sequence is cut: into so many ranges of KV heads, and the pages of each into so many segments.

    A segment has every ``segments``-th page of the text: so all of them grow alike. By heads a worker answers with
    the output, by segments with a partial ``(out, lse)`` (DistAttention, Lin et al. 2024).

    Args:
        heads: ranges of KV heads, at most as many as there are; None: one for each worker, as far as heads go.
        segments: to each range of heads.
        local: so many of a sequence's ``heads x segments`` parts stay on the model rank, the first ones.
    """

    heads: int | None = None
    segments: int = 1
    local: int = 0

    def __post_init__(self) -> None:
        if self.heads is not None:
            check_int("Placement(heads=)", self.heads, least=1, remedy="it is a number of ranges of KV heads")
        check_int("Placement(segments=)", self.segments, least=1, remedy="it is a number of segments of a text")
        check_int("Placement(local=)", self.local, least=0, remedy="it is a number of parts that stay here")

    def cuts(self, kv_heads: int, workers: int) -> list[Cut]:
        """The parts of a sequence, of a model with so many KV heads. Raises ValueError where it can't be cut so."""
        ranges = self.heads or min(kv_heads, max(1, workers // self.segments) + (self.local > 0))
        if ranges > kv_heads:
            raise ValueError(f"Placement(heads=): got {ranges} for {kv_heads} KV heads, expected at most so many")
        parts = ranges * self.segments
        if self.local > parts:
            raise ValueError(
                f"Placement(local=): got {self.local}, expected at most {parts}, of {ranges} ranges of heads and "
                f"{self.segments} segments"
            )
        if not workers and self.local < parts:
            raise ValueError(f"Placement: got no workers for {parts - self.local} parts, expected one or more")
        return [
            Cut(range(share.start, share.stop), segment, self.segments)
            for share in even_shares(kv_heads, ranges)
            for segment in range(self.segments)
        ]


@dataclass(frozen=True)
class Cut:
    """Part of a sequence: KV heads, and which of how many segments."""

    heads: range
    segment: int
    segments: int


def assign(sizes: Sequence[int], free: Mapping[int, int], taken: Mapping[int, int] | None = None) -> list[int]:
    """A worker for each of a sequence's parts, of so many bytes: the one that has most memory free.

    Parts go to different workers as long as there are some. free: bytes, by worker. taken: parts of the sequence that
    workers have already. Raises ValueError where a part fits nowhere.
    """
    left, held, found = dict(free), {worker: (taken or {}).get(worker, 0) for worker in free}, list[int]()
    for size in sizes:
        fitting = [worker for worker in left if left[worker] >= size]
        if not fitting:
            most = max(left.values(), default=0)
            raise NoRoom(
                f"attention workers: got {size:,} bytes to hold, expected at most {most:,}, the most that is free on "
                f"one of {len(left)}; use more segments, more workers, a smaller batch or capacity"
            )
        best = min(fitting, key=lambda worker: (held[worker], -left[worker], worker))
        left[best] -= size
        held[best] += 1
        found.append(best)
    return found


@dataclass(frozen=True)
class Held:
    """A line of the ledger: who holds which part of a sequence."""

    sequence: int
    layers: int
    heads: range
    segment: int
    segments: int
    holder: str
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Ledger:
    """Who holds what, printable."""

    lines: tuple[Held, ...] = field(default=())

    def __str__(self) -> str:
        rows = [("sequence", "layers", "KV heads", "segment", "holder", "tokens", "MiB")]
        for line in self.lines:
            heads = f"{line.heads.start}-{line.heads.stop - 1}"
            segment = f"{line.segment + 1} of {line.segments}"
            size = f"{line.bytes / 2**20:.1f}"
            rows.append((str(line.sequence), str(line.layers), heads, segment, line.holder, str(line.tokens), size))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows)
