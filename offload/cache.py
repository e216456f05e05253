"""A key-value cache whose memory is on attention workers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import seqpar
from seqpar.cache import CAPACITY, CHUNK
from seqpar.masks import Mask, check_int
from seqpar.shards import Memory

from .errors import WorkerLost
from .memory import RemoteMemory
from .parts import Shape
from .placement import LOCAL, Ledger, Placement, assign
from .workers import Workers


class OffloadedCache(seqpar.KVCache):
    """A :class:`seqpar.KVCache` whose keys and values, and the attention over them, are on workers.

    ::

        with seqpar.offload.Workers.join("host:29600") as workers:
            cache = seqpar.offload.OffloadedCache(mask, heads=(32, 8), head_dim=128, workers=workers)
            out = cache.attend(q, k, v, layer=0)  # [B, T, H, D], [B, T, Hkv, D], [B, T, Hkv, Dv] -> [B, T, H, Dv]

    One model rank has all rows, its own batch. Per layer and step the wire carries q and the new k and v out, and the
    output back, whatever the context: ``e B (2 H D + 2 Hkv D)`` bytes by heads, and with S segments ``e B (2 S H D +
    2 Hkv D)`` and the partials' lse, ``4 S B H``.

    Args:
        mask, heads, head_dim, capacity, batch, layers, dtype, device, page, chunk: as for :class:`seqpar.KVCache`.
        workers: this rank's connections.
        placement: how each sequence is cut; by default by heads, over all workers.

    Raises:
        ValueError: as the cache; for a placement that can't be, and where workers lack the memory.
        WorkerLost: from every call, once a worker that holds something is lost, until :meth:`restore`.
    """

    def __init__(
        self,
        mask: Mask,
        *,
        workers: Workers,
        heads: int | tuple[int, int],
        head_dim: int | tuple[int, int],
        placement: Placement | None = None,
        capacity: int = CAPACITY,
        batch: int = 1,
        layers: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page: int | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self._workers, self._placement = workers, placement or Placement()
        super().__init__(
            mask, heads=heads, head_dim=head_dim, capacity=capacity, batch=batch, layers=layers, dtype=dtype,
            device=device, page=page, chunk=chunk,
        )  # fmt: skip

    def _take_memory(self) -> Memory:
        shape = Shape(
            self.mask, (self.heads, self.kv_heads), self._head_dim, self._dtype, self._device, self.capacity,
            self.chunk, self.page, self.batch, self.layers,
        )  # fmt: skip
        self._remote = RemoteMemory(shape, self._workers, self._placement)
        return self._remote

    def resident_pages(self, row: int = 0) -> list[int]:
        """Refused: pages are on workers."""
        raise ValueError("resident_pages: got an offloaded cache, expected one whose pages are here; see its ledger")

    @property
    def ledger(self) -> Ledger:
        """Who holds what; ``print`` it."""
        return Ledger(tuple(self._remote.ledger(self.lengths)))

    def migrate(self, sequence: int, to: int | None, *, heads: range | None = None, segment: int | None = None) -> None:
        """Move a sequence's parts to another worker, between two steps; results stay as they are.

        Args:
            sequence: the batch row.
            to: the worker's number, or None: to this rank.
            heads, segment: of the part to move, as the ledger names them; all of the sequence's by default.

        Raises:
            ValueError: for no such part or worker, or where it lacks the memory.
            WorkerLost: where one of both is lost.

        Each part is then in full where it was, or where it should go.
        """
        self._rows([sequence])
        target = LOCAL if to is None else to
        if target != LOCAL and target not in self._workers.alive:
            raise ValueError(f"to: got worker {to!r}, expected one of {sorted(self._workers.alive)}, or None for here")
        chosen = [
            part
            for part in self._remote.parts
            if part.row == sequence and heads in (None, part.cut.heads) and segment in (None, part.cut.segment)
        ]
        if not chosen:
            raise ValueError(
                f"migrate: got sequence {sequence}, heads {heads}, segment {segment}, expected a part that there is:\n"
                f"{self.ledger}"
            )
        for part in chosen:
            if part.holder != target:
                self._remote.move(part, target, self._length_between_steps(sequence))

    def leave(self, number: int) -> None:
        """Move everything off a worker to where memory is free, between two steps."""
        for part in [part for part in self._remote.parts if part.holder == number]:
            free = {n: size for n, size in self._workers.free().items() if n != number}
            taken = {n: sum(p.row == part.row and p.holder == n for p in self._remote.parts) for n in free}
            self._remote.move(
                part, assign([self._remote.size(part)], free, taken)[0], self._length_between_steps(part.row)
            )

    def lost_rows(self, lengths: Sequence[int]) -> list[int]:
        """Sequences that can't go on from these lengths unless they are written anew.

        Those of which a lost worker held something, also before an earlier :meth:`restore`; and where the mask forgets
        keys, those that had got further by more than a chunk.
        """
        rows = {p.row for member, parts in self._remote.by_member() if member.lost is not None for p in parts}
        rows |= {row for layer in self._lengths for row, n in enumerate(layer) if n < lengths[row]}
        if self._rooms.forgets:
            furthest = (max(layers) for layers in zip(*self._written, strict=True))
            both = enumerate(zip(furthest, lengths, strict=True))
            rows |= {row for row, (most, length) in both if most - length > self.chunk}
        return sorted(rows)

    def restore(self, lengths: Sequence[int], rebuilt: Sequence[int]) -> None:
        """After a loss: give what was lost a new place, empty, and take every row back to a length that it had.

        Args:
            lengths: of each row, at the end of a step that was done.
            rebuilt: rows whose text will be written anew, :meth:`lost_rows` among them: they are empty afterwards.

        Raises:
            WorkerLost: where another worker is lost, or none is left; call it again in the first case.
            ValueError: where those that are left lack the memory.
        """
        check_int("rows", len(lengths), least=self.batch, remedy="give the length of each")
        living = self._workers.alive
        lost = [part for part in self._remote.parts if part.holder not in (LOCAL, *living)]
        if lost and all(member.leaving for member in living.values()):
            gone = self._workers.members[lost[-1].holder]
            reason = f"{gone.lost}; no other worker is left that stays"
            raise WorkerLost(gone.name, self.lost_rows(lengths), reason)
        for member in living.values():
            member.drain()
        wanted = [0 if row in rebuilt else length for row, length in enumerate(lengths)]
        self._set_lengths(wanted)
        if lost:
            self._remote.place(lost)
        self._remote.truncate(wanted)
        self._remote.check_whole()

    def release(self) -> None:
        """Have the workers free all of it; the cache is of no more use."""
        self._remote.release()

    def _length_between_steps(self, row: int) -> int:
        lengths = {layer[row] for layer in self._lengths}
        if len(lengths) > 1:
            raise ValueError("migrate: got a step under way, expected all layers to have the same tokens; wait for it")
        return lengths.pop()
