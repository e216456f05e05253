"""What a cache on workers is made of: parts of sequences, and who has each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seqpar.masks import Mask
from seqpar.shards import Rooms, Shard

from .dialect import size_of
from .placement import Cut


@dataclass(frozen=True)
class Shape:
    """What a cache holds: as for :class:`seqpar.KVCache`."""

    mask: Mask
    heads: tuple[int, int]
    head_dim: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    capacity: int
    chunk: int
    page: int | None
    batch: int
    layers: int

    def rooms(self, part: Cut) -> Rooms:
        """Of a part of one sequence."""
        return Rooms(
            self.mask, self.heads[1], heads=part.heads, place=(part.segment, part.segments), capacity=self.capacity,
            chunk=self.chunk, page=self.page, remembers=2 * self.batch + 8,
        )  # fmt: skip

    def bytes_of(self, rooms: Rooms) -> int:
        """What a part of one sequence takes, of all layers."""
        return size_of(rooms, self.head_dim, self.dtype, self.layers)

    def shard(self, rooms: Rooms) -> Shard:
        """Memory for a part of one sequence, here."""
        return Shard(
            rooms, head_dim=self.head_dim, batch=1, layers=self.layers, dtype=self.dtype, device=self.device
        )  # fmt: skip


@dataclass(eq=False)
class Part:
    """Part of a sequence (a batch row), and who has it: a worker's number and its shard's, or this rank's shard."""

    row: int
    cut: Cut
    rooms: Rooms
    queries: slice
    holder: int
    shard: int = -1
    here: Shard | None = None
